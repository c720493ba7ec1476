"""The trainer's side of the teacher: ask for a rollout's scores while other work goes on, in whose tokens it takes.

With one tokenizer, student tokens are teacher tokens. With two, the response's text is tokenised again for the
teacher, each side's own end symbol stands for the other's, and the log-probabilities of the teacher's tokens come back
on the student's, token for token (rewards/alignment.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoConfig, AutoTokenizer

from configs.checks import require
from configs.schema import RunConfig
from inference.client import TeacherClient, TeacherDecoding
from inference.fingerprint import tokenizer_fingerprint
from inference.output_layer import load_output_layer
from inference.packing import Group, groups_of
from inference.replies import TeacherNext
from rewards.alignment import carry
from training.data import answer_lead, chat_tokens
from training.experience import Prompt, Rollout, TeacherEntries, TeacherView
from training.token_bytes import TokenBytes
from training.translation import Translator

PendingView = Callable[[], TeacherView]
"""Waits for the teacher and returns what it said."""


@dataclass(frozen=True)
class TeacherFacts:
    """What is known of the teacher before a model is loaded."""

    path: Path
    """Its model directory; tokenizer and output layer are read from there."""
    same_tokenizer: bool
    """Student tokens are teacher tokens."""
    student: Path | str = ""
    """The student's model directory; its tokenizer is read from there where the two differ."""

    def output_layer(self, dtype: torch.dtype) -> torch.Tensor:
        """[V, D] the teacher's output layer."""
        return load_output_layer(self.path).to(dtype)


def teacher_facts(teacher: Path, student: Path | str) -> TeacherFacts:
    """Compare the two tokenizers."""
    return TeacherFacts(teacher, tokenizer_fingerprint(teacher) == tokenizer_fingerprint(student), student)


def check_tokenizers(config: RunConfig, key_of_teacher: str, facts: TeacherFacts) -> None:
    """Raises ValueError where responses cannot be carried between the tokenizers, or a chat template is missing."""
    if facts.same_tokenizer and not config.data.use_chat_template:
        return
    for key, path in (("student.path", config.student.path), (key_of_teacher, facts.path)):
        tokenizer = AutoTokenizer.from_pretrained(path)
        if not facts.same_tokenizer:
            TokenBytes(tokenizer, f"{key} = {str(path)!r}")
        require(
            not config.data.use_chat_template or bool(tokenizer.chat_template), "data.use_chat_template", True,
            f"{key} = {str(path)!r} has a tokenizer without a chat template; leave it out",
        )  # fmt: skip


class StudentTokens(Protocol):
    """How the student writes: the actor."""

    tokenizer: Any
    """Its tokenizer."""
    end_tokens: tuple[int, ...]
    """Its end symbols."""


class TeacherLink:
    """One rank's connection to the teacher server."""

    def __init__(self, client: TeacherClient, facts: TeacherFacts, output_VD: torch.Tensor | None) -> None:
        self._client = client
        self._facts = facts
        self._output_VD = output_VD
        self._tokenizer: Any = AutoTokenizer.from_pretrained(facts.path)
        self._translator: Translator | None = None
        if not facts.same_tokenizer:
            self._translator = Translator(
                TokenBytes(AutoTokenizer.from_pretrained(facts.student), f"student.path = {str(facts.student)!r}"),
                TokenBytes(self._tokenizer, f"teacher.path = {str(facts.path)!r}"),
            )

    @property
    def same_tokenizer(self) -> bool:
        """Student tokens are teacher tokens."""
        return self._facts.same_tokenizer

    def ask(self, rollout: Rollout, *, whole_distribution: bool, entries: int = 0) -> PendingView:
        """Send a rollout to be scored; call the result to wait for it.

        `whole_distribution`: the teacher's last hidden states come back as well, which with its output layer give
        its distribution over the whole vocabulary (equal tokenizers only). With `entries` K above 0, its K likeliest
        entries come in their place.
        """
        if self._translator is not None:
            return self._ask_for_text(rollout, self._translator)
        if whole_distribution and entries > 0:
            return self._ask_for_entries(rollout, entries)
        if whole_distribution and self._output_VD is not None:
            return self._ask_for_hidden(rollout, self._output_VD)
        return self._ask_for_tokens(rollout)

    def _ask_for_tokens(self, rollout: Rollout) -> PendingView:
        future = self._client.score(self._groups(rollout))

        def wait() -> TeacherView:
            score = future.result()
            logprobs_BR = score.padded(score.logprobs_S, rollout.behavior_logprobs_BR.shape[1])
            return TeacherView(logprobs_BR, None, len(score.logprobs_S))

        return wait

    def _ask_for_entries(self, rollout: Rollout, count: int) -> PendingView:
        tokens, likeliest = self._ask_for_tokens(rollout), self._client.topk(self._groups(rollout), count)

        def wait() -> TeacherView:
            answer = likeliest.result()
            return replace(tokens(), entries=TeacherEntries(answer.ids_SK, answer.logprobs_SK))

        return wait

    def _ask_for_hidden(self, rollout: Rollout, output_VD: torch.Tensor) -> PendingView:
        future = self._client.hidden(self._groups(rollout))

        def wait() -> TeacherView:
            states = future.result()
            hidden_SD = states.hidden_SH
            labels_S = torch.tensor([t for r in rollout.responses for t in r], dtype=torch.int64)
            logprobs_S = chosen_logprobs(hidden_SD, output_VD, labels_S)
            logprobs_BR = states.padded(logprobs_S, rollout.behavior_logprobs_BR.shape[1])
            return TeacherView(logprobs_BR, hidden_SD, len(logprobs_S))

        return wait

    def _groups(self, rollout: Rollout) -> list[Group]:
        """One tokenizer: the rollout in its tokens, behind the teacher's own prompts."""
        return groups_of([self.prompt_tokens(p) for p in rollout.prompts], rollout.responses, rollout.group_size)

    def _ask_for_text(self, rollout: Rollout, translator: Translator) -> PendingView:
        prompts = [self.prompt_tokens(p) for p in rollout.prompts]
        ends = [self._end_token(p) for p in rollout.prompts for _ in range(rollout.group_size)]
        read = [
            translator.translate(response, finished=finished, end_token=end)
            for response, finished, end in zip(rollout.responses, rollout.finished_B.tolist(), ends, strict=True)
        ]
        future = self._client.score(groups_of(prompts, [r.tokens for r in read], rollout.group_size))

        def wait() -> TeacherView:
            logprobs_S = future.result().logprobs_S
            longest = rollout.behavior_logprobs_BR.shape[1]
            of_response = logprobs_S.split([len(r.tokens) for r in read])
            carried = [carry(s.tolist(), r.student_token, longest) for s, r in zip(of_response, read, strict=True)]
            logprobs_BR = torch.tensor(carried, dtype=torch.float32).reshape(len(read), longest)
            return TeacherView(logprobs_BR, None, len(logprobs_S), unread_tokens=sum(r.unread for r in read))

        return wait

    def ask_for_texts(
        self, prompts: Sequence[str], texts: Sequence[str]
    ) -> Callable[[], tuple[torch.Tensor, list[int]]]:
        """Send texts that follow prompts, neither of them the student's; call the result to wait for float32 [S]
        log-probabilities of all texts' tokens, the teacher's end symbol last in each, and how many each has. What the
        teacher has no room for is cut off: of a text its end beyond half of the room, of a prompt its beginning."""
        end = int(self._tokenizer.eos_token_id)
        settings = AutoConfig.from_pretrained(self._facts.path).get_text_config()
        room = int(getattr(settings, "max_position_embeddings", None) or 2**30)
        read = [(*self._tokenizer(" " + t, add_special_tokens=False)["input_ids"], end) if t else (end,) for t in texts]
        read = [tokens[: room // 2] for tokens in read]
        asked = [
            tuple(self._tokenizer(prompt)["input_ids"])[-(room - len(tokens)) :]
            for prompt, tokens in zip(prompts, read, strict=True)
        ]
        future = self._client.score(groups_of(asked, read, 1))

        def wait() -> tuple[torch.Tensor, list[int]]:
            return future.result().logprobs_S, [len(tokens) for tokens in read]

        return wait

    def answer(
        self, prompts: Sequence[Prompt], max_new_tokens: int, *, temperature: float = 0.0, seed: int = 0
    ) -> Future[list[str]]:
        """The teacher's own answers as texts; temperature 0 is greedy."""
        tokens = [self.prompt_tokens(p) for p in prompts]
        inner = self._client.generate(tokens, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        out: Future[list[str]] = Future()

        def done(finished: Any) -> None:
            try:
                texts = self._tokenizer.batch_decode(
                    [list(r) for r in finished.result().responses], skip_special_tokens=True
                )
                out.set_result([t.strip() for t in texts])
            except BaseException as error:
                out.set_exception(error)

        inner.add_done_callback(done)
        return out

    def responses(
        self, prompts: Sequence[Prompt], max_new_tokens: int, student: StudentTokens, *, temperature: float, seed: int
    ) -> list[tuple[tuple[int, ...], bool]]:
        """The teacher's answers as student tokens, the end symbol included, and whether each has ended.

        With two tokenizers the answer's text is tokenised again; one that is longer than `max_new_tokens` then is cut.
        """
        if not prompts:
            return []
        if self._translator is None:
            asked = [self.prompt_tokens(p) for p in prompts]
            inner = self._client.generate(asked, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
            ends = set(student.end_tokens)
            return [(r, bool(r) and r[-1] in ends) for r in inner.result().responses]
        out = []
        texts = self.answer(prompts, max_new_tokens, temperature=temperature, seed=seed).result()
        for prompt, text in zip(prompts, texts, strict=True):
            words = self._translator.student.encode(answer_lead(prompt) + text).tokens if text else ()
            tokens = (*words, int(student.tokenizer.eos_token_id))
            out.append((tokens[:max_new_tokens], len(tokens) <= max_new_tokens))
        return out

    def decode(self, prompts: Sequence[tuple[int, ...]], samples: int, max_new_tokens: int) -> TeacherDecoding:
        """Token by token beside the student; `whole_distribution` reads its answers."""
        return self._client.decode(prompts, max_new_tokens=max_new_tokens, samples=samples)

    def whole_distribution(self, answer: TeacherNext) -> torch.Tensor:
        """float32 [A, V] the teacher's log-probabilities of the next token."""
        assert self._output_VD is not None
        return (answer.hidden_AH.to(self._output_VD) @ self._output_VD.T).float().log_softmax(-1)

    def close(self) -> None:
        """End the session."""
        self._client.close()

    def prompt_tokens(self, prompt: Prompt) -> tuple[int, ...]:
        """A prompt as the teacher reads it: in its own tokens, and in its own chat template where there is one."""
        if prompt.chat:
            return chat_tokens(self._tokenizer, prompt.text)
        return prompt.tokens if self.same_tokenizer else tuple(self._tokenizer(prompt.text)["input_ids"])

    def _end_token(self, prompt: Prompt) -> int:
        """What ends an answer of the teacher; in a chat, what its template puts behind one."""
        end = end_of_turn(self._tokenizer) if prompt.chat else self._tokenizer.eos_token_id
        if end is None:
            raise ValueError(f"teacher.path = {str(self._facts.path)!r}: its tokenizer names no eos_token")
        return int(end)


def end_of_turn(tokenizer: Any) -> int | None:
    """The special symbol that a chat template puts behind an answer; where it puts none, the end symbol."""
    messages = [{"role": "user", "content": "Hvat?"}, {"role": "assistant", "content": "Svar"}]
    behind = str(tokenizer.apply_chat_template(messages, tokenize=False)).rpartition("Svar")[2]
    ids = tokenizer(behind.lstrip(), add_special_tokens=False)["input_ids"]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {tokenizer.eos_token_id}
    return ids[0] if ids and ids[0] in special else tokenizer.eos_token_id


def chosen_logprobs(
    hidden_SD: torch.Tensor, output_VD: torch.Tensor, labels_S: torch.Tensor, chunk: int = 1024
) -> torch.Tensor:
    """float32 [S] log-probabilities of `labels_S` from last hidden states and the output layer, in chunks.

    Computed where the output layer is; hidden states come from the teacher, and the answer goes, on the CPU.
    """
    pieces = []
    for hidden, labels in zip(hidden_SD.split(chunk), labels_S.split(chunk), strict=True):
        logprobs = (hidden.to(output_VD) @ output_VD.T).float().log_softmax(-1)
        pieces.append(logprobs.gather(-1, labels[:, None].to(logprobs.device)).squeeze(-1))
    return torch.cat(pieces).cpu() if pieces else torch.zeros(0)
