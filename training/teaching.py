"""The trainer's side of the teacher: ask for a rollout's scores while other work goes on, in whose tokens it takes.

With one tokenizer, student tokens are teacher tokens. With two, the response's text is tokenised again for the
teacher, each side's own end symbol stands for the other's, and the total comes back on the response's last token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoTokenizer

from inference.client import TeacherClient, TeacherDecoding
from inference.fingerprint import tokenizer_fingerprint
from inference.output_layer import load_output_layer
from inference.packing import groups_of
from inference.replies import TeacherNext
from rewards.base import place_on_last_token
from training.experience import Prompt, Rollout, TeacherEntries, TeacherView

PendingView = Callable[[], TeacherView]
"""Waits for the teacher and returns what it said."""


@dataclass(frozen=True)
class TeacherFacts:
    """What is known of the teacher before a model is loaded."""

    path: Path
    """Its model directory; tokenizer and output layer are read from there."""
    same_tokenizer: bool
    """Student tokens are teacher tokens."""

    def output_layer(self, dtype: torch.dtype) -> torch.Tensor:
        """[V, D] the teacher's output layer."""
        return load_output_layer(self.path).to(dtype)


def teacher_facts(teacher: Path, student: Path | str) -> TeacherFacts:
    """Compare the two tokenizers."""
    return TeacherFacts(teacher, tokenizer_fingerprint(teacher) == tokenizer_fingerprint(student))


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
        if not self.same_tokenizer:
            return self._ask_for_text(rollout)
        if whole_distribution and entries > 0:
            return self._ask_for_entries(rollout, entries)
        if whole_distribution and self._output_VD is not None:
            return self._ask_for_hidden(rollout, self._output_VD)
        return self._ask_for_tokens(rollout)

    def _ask_for_tokens(self, rollout: Rollout) -> PendingView:
        future = self._client.score(rollout.groups())

        def wait() -> TeacherView:
            score = future.result()
            logprobs_BR = score.padded(score.logprobs_S, rollout.behavior_logprobs_BR.shape[1])
            return TeacherView(logprobs_BR, None, len(score.logprobs_S))

        return wait

    def _ask_for_entries(self, rollout: Rollout, count: int) -> PendingView:
        tokens, likeliest = self._ask_for_tokens(rollout), self._client.topk(rollout.groups(), count)

        def wait() -> TeacherView:
            answer = likeliest.result()
            return replace(tokens(), entries=TeacherEntries(answer.ids_SK, answer.logprobs_SK))

        return wait

    def _ask_for_hidden(self, rollout: Rollout, output_VD: torch.Tensor) -> PendingView:
        future = self._client.hidden(rollout.groups())

        def wait() -> TeacherView:
            states = future.result()
            hidden_SD = states.hidden_SH
            labels_S = torch.tensor([t for r in rollout.responses for t in r], dtype=torch.int64)
            logprobs_S = chosen_logprobs(hidden_SD, output_VD, labels_S)
            logprobs_BR = states.padded(logprobs_S, rollout.behavior_logprobs_BR.shape[1])
            return TeacherView(logprobs_BR, hidden_SD, len(logprobs_S))

        return wait

    def _ask_for_text(self, rollout: Rollout) -> PendingView:
        prompts = [self._encode(p.text, special=True) for p in rollout.prompts]
        responses = []
        for text, finished in zip(rollout.texts, rollout.finished_B.tolist(), strict=True):
            tokens = self._encode(" " + text, special=False) if text else ()
            responses.append((*tokens, self._end_token) if finished else tokens)
        future = self._client.score(groups_of(prompts, responses, rollout.group_size))
        lengths = torch.tensor([len(r) for r in responses], dtype=torch.int64)

        def wait() -> TeacherView:
            logprobs_S = future.result().logprobs_S
            owner_S = torch.repeat_interleave(torch.arange(len(responses)), lengths)
            totals_B = torch.zeros(len(responses)).index_add(0, owner_S, logprobs_S)
            placed = place_on_last_token(totals_B, rollout.lengths_B, rollout.behavior_logprobs_BR.shape[1])
            return TeacherView(placed, None, len(logprobs_S))

        return wait

    def answer(
        self, prompts: Sequence[Prompt], max_new_tokens: int, *, temperature: float = 0.0, seed: int = 0
    ) -> Future[list[str]]:
        """The teacher's own answers as texts; temperature 0 is greedy."""
        tokens = [p.tokens if self.same_tokenizer else self._encode(p.text, special=True) for p in prompts]
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
        if self.same_tokenizer:
            inner = self._client.generate(
                [p.tokens for p in prompts], max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
            )
            ends = set(student.end_tokens)
            return [(r, bool(r) and r[-1] in ends) for r in inner.result().responses]
        out = []
        for text in self.answer(prompts, max_new_tokens, temperature=temperature, seed=seed).result():
            words = student.tokenizer(" " + text, add_special_tokens=False)["input_ids"] if text else []
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

    def _encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=special)["input_ids"])

    @property
    def _end_token(self) -> int:
        end = self._tokenizer.eos_token_id
        if end is None:
            raise ValueError(f"teacher.path = {str(self._facts.path)!r}: its tokenizer names no eos_token")
        return int(end)


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
