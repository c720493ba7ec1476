"""The trainer's side of the teacher: ask for a rollout's scores while other work goes on, in whose tokens it takes.

With one tokenizer, student tokens are teacher tokens. With two, the response's text is tokenised again for the
teacher, each side's own end symbol stands for the other's, and the log-probabilities of the teacher's tokens come back
on the student's, token for token (rewards/alignment.py). A response that is then longer than the teacher's context has
no score (NaN): a part of one would reward what the teacher does not read, so its group is left out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from inference.attention.packing import Group, groups_of
from inference.client import TeacherClient
from rewards.alignment import carry
from training.experience import Prompt, Rollout, TeacherView
from training.losses import Head
from training.teacher.facts import TeacherFacts
from training.teacher.token_bytes import TokenBytes
from training.teacher.translation import Translator

log = logging.getLogger(__name__)
PendingView = Callable[[], TeacherView]
"""Waits for the teacher and returns what it said."""


class TeacherLink:
    """One rank's connection to the teacher server."""

    def __init__(self, client: TeacherClient, facts: TeacherFacts, head: Head | None) -> None:
        """`head` makes logits of the teacher's hidden states; None: only log-probabilities of tokens are asked for."""
        self.client, self.facts, self.head = client, facts, head
        self._tokenizer = facts.teacher.tokenizer
        self._translator: Translator | None = None
        self._said_too_long = False
        if not facts.same_tokenizer:
            self._translator = Translator(
                TokenBytes(facts.student.tokenizer, "student.path"),
                TokenBytes(self._tokenizer, f"teacher.path = {str(facts.path)!r}"),
                space=len(facts.teacher.lead) - len(facts.student.lead),
            )

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
        if whole_distribution and self.head is not None:
            return self._ask_for_hidden(rollout, self.head)
        return self._ask_for_tokens(rollout)

    def _ask_for_tokens(self, rollout: Rollout) -> PendingView:
        future = self.client.score(self._groups(rollout))
        return lambda: all_read(rollout, future.result())

    def _ask_for_entries(self, rollout: Rollout, count: int) -> PendingView:
        tokens, likeliest = self._ask_for_tokens(rollout), self.client.topk(self._groups(rollout), count)

        def wait() -> TeacherView:
            logprobs_SK, ids_SK = likeliest.result()
            return replace(tokens(), top_ids_SK=self._exchanged(ids_SK), top_logprobs_SK=logprobs_SK)

        return wait

    def _ask_for_hidden(self, rollout: Rollout, head: Head) -> PendingView:
        future = self.client.hidden(self._groups(rollout))

        def wait() -> TeacherView:
            hidden_SD = future.result()
            labels_S = torch.tensor([t for r in rollout.responses_B for t in r], dtype=torch.int64)
            return replace(all_read(rollout, chosen_logprobs(hidden_SD, head, labels_S)), hidden_SD=hidden_SD)

        return wait

    def _groups(self, rollout: Rollout) -> list[Group]:
        """One tokenizer: the rollout in its tokens, behind the teacher's own prompts; each side's end stands for the
        other's."""
        responses = map(self._with_other_end, rollout.responses_B, rollout.finished_B.tolist())
        return groups_of([self.prompt_tokens(p) for p in rollout.prompts_N], list(responses), rollout.group_size)

    def _with_other_end(self, tokens: tuple[int, ...], ended: bool) -> tuple[int, ...]:
        """One side's answer as the other would have ended it."""
        return (*tokens[:-1], self.facts.exchanged.get(tokens[-1], tokens[-1])) if ended else tokens

    def _exchanged(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids with each side's end in the place of the other's."""
        out = ids.clone()
        for ours, theirs in self.facts.exchanged.items():
            out[ids == theirs] = ours
        return out

    def _ask_for_text(self, rollout: Rollout, translator: Translator) -> PendingView:
        prompts = [self.prompt_tokens(p) for p in rollout.prompts_N]
        read = [
            translator.translate(response, finished=finished, end_token=self.facts.teacher.end)
            for response, finished in zip(rollout.responses_B, rollout.finished_B.tolist(), strict=True)
        ]
        total_B = [len(prompts[b // rollout.group_size]) + len(r.tokens) for b, r in enumerate(read)]
        room = self.client.info().max_positions
        fits_B = [total <= room for total in total_B]
        if not all(fits_B) and not self._said_too_long:
            self._said_too_long = True
            said = (
                "%s: a prompt with its response takes %d tokens of the teacher, whose context has %d; such responses "
                "have no score, and their groups are left out (groups/dropped); lower sampling.max_new_tokens"
            )
            log.warning(said, self.facts.path, max(total_B), room)
        sent = [r.tokens if fits else () for r, fits in zip(read, fits_B, strict=True)]
        future = self.client.score(groups_of(prompts, sent, rollout.group_size))

        def wait() -> TeacherView:
            of_response = future.result().split([len(tokens) for tokens in sent])
            carried = [
                torch.tensor(carry(s.tolist(), r.student_token, len(response)), dtype=torch.float32)
                if fits
                else torch.full((len(response),), torch.nan)
                for s, r, response, fits in zip(of_response, read, rollout.responses_B, fits_B, strict=True)
            ]
            return TeacherView(
                logprobs_S=torch.cat(carried) if carried else torch.zeros(0),
                scored_tokens_B=torch.tensor([len(tokens) for tokens in sent], dtype=torch.int64),
                unread_tokens_B=torch.tensor([r.unread for r in read], dtype=torch.int64),
            )

        return wait

    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int, **drawn: Any) -> list[tuple[str, bool]]:
        """The teacher's own answers as texts, and whether each has ended. A character that the limit has cut is left
        out. `drawn`: temperature, seed and numbers, as `TeacherClient.generate` takes them; by default it is greedy."""
        written = self._generate(prompts, max_new_tokens, **drawn)
        texts = [self.facts.teacher.said(tokens) for tokens, _ in written]
        return [
            (text if ended else text.rstrip("\ufffd").strip(), ended)
            for text, (_, ended) in zip(texts, written, strict=True)
        ]

    def responses(
        self, prompts: Sequence[Prompt], max_new_tokens: int, **drawn: Any
    ) -> list[tuple[tuple[int, ...], bool]]:
        """The teacher's answers as student tokens, what ends the student's answers last where it has ended, and whether
        it has.

        With two tokenizers the answer's text is tokenised again; one that is longer than `max_new_tokens` then is cut.
        """
        if not prompts:
            return []
        if self._translator is None:
            written = self._generate(prompts, max_new_tokens, **drawn)
            return [(self._with_other_end(tokens, ended), ended) for tokens, ended in written]
        out, student = [], self.facts.student
        for text, ended in self.answer(prompts, max_new_tokens, **drawn):
            words = self._translator.student.encode(student.lead + text).tokens if text else ()
            tokens = (*words, student.end) if ended else words
            out.append((tokens[:max_new_tokens], ended and len(tokens) <= max_new_tokens))
        return out

    def _generate(
        self, prompts: Sequence[Prompt], max_new_tokens: int, **drawn: Any
    ) -> list[tuple[tuple[int, ...], bool]]:
        """The teacher's answers in its own tokens, and whether each has ended: by a symbol that the model names, or the
        one that its chat template puts there."""
        ends = sorted({*self.client.info().eos_ids, self.facts.teacher.end})
        asked = [self.prompt_tokens(p) for p in prompts]
        written = self.client.generate(asked, max_new_tokens=max_new_tokens, eos_ids=ends, **drawn).result()
        return [(tokens, bool(tokens) and tokens[-1] in ends) for tokens in written]

    def prompt_tokens(self, prompt: Prompt) -> tuple[int, ...]:
        """A prompt as the teacher reads it."""
        return self.facts.teacher.prompt(prompt.asked)


def all_read(rollout: Rollout, logprobs_S: torch.Tensor) -> TeacherView:
    """What a teacher with the student's tokenizer says: it scores each token."""
    return TeacherView(logprobs_S, rollout.lengths_B, torch.zeros_like(rollout.lengths_B))


def chosen_logprobs(hidden_SD: torch.Tensor, head: Head, labels_S: torch.Tensor, chunk: int = 128) -> torch.Tensor:
    """float32 [S] log-probabilities of `labels_S` from last hidden states and the head, in chunks.

    Computed where the head is; hidden states come from the teacher, and the answer goes, on the CPU.
    """
    pieces = []
    for hidden, labels in zip(hidden_SD.split(chunk), labels_S.split(chunk), strict=True):
        logprobs = head(hidden).float().log_softmax(-1)
        pieces.append(logprobs.gather(-1, labels[:, None].to(logprobs.device)).squeeze(-1))
    return torch.cat(pieces).cpu() if pieces else torch.zeros(0)
