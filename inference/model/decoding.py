"""Decoding: prompts are prefilled once, and their responses grow against that cache, on every rank alike.

`Decoding` serves `answer`, which runs to the end in one request, and `next`, where the client chooses each token and
the cache waits between requests. What waits is bounded: one decoding for each session, `max_cache_tokens` in all, and
the longest unused goes first. A client whose decoding is gone opens it again with the tokens chosen so far.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from inference.attention.decode import DecodePlan
from inference.attention.packed import PrefillPlan
from inference.attention.packing import Group, pack_row, within
from inference.model.teacher import Teacher
from inference.protocol.wire import Request, StateLost

logger = logging.getLogger("teacher")


class Decoding:
    """N prompts in one packed row, `samples` responses to each; all growing responses are at the same step."""

    def __init__(self, teacher: Teacher, prompts: Sequence[Group], samples: int, max_new_tokens: int) -> None:
        self._teacher = teacher
        row = pack_row([Group(group.prompt, ()) for group in prompts]).to(teacher.device)
        prefill = PrefillPlan(row)
        hidden = teacher.forward(row.tokens_T, row.positions_T, prefill)
        last_N = torch.tensor(row.group_lengths, device=teacher.device).cumsum(0) - 1
        self.first_BH = hidden[last_N].repeat_interleave(samples, 0)
        """[B, Hidden] what predicts the first token of each response."""
        self._plan = DecodePlan(prefill.cache, samples, max_new_tokens)

    def step(self, rows_A: Sequence[int], tokens_A: Sequence[int]) -> torch.Tensor:
        """[A, Hidden] what predicts the token after these."""
        device = self._teacher.device
        positions = self._plan.advance(torch.tensor(rows_A))
        return self._teacher.forward(torch.tensor(tokens_A, device=device), positions, self._plan)


@dataclass
class _Held:
    """The decoding of a session."""

    opened: Request
    parts: list[Decoding]
    """Of each packed row of prompts."""
    rows_A: tuple[int, ...]
    """Responses that still grow."""
    step: int = 0

    def advance(self, rows_A: tuple[int, ...], tokens_A: Sequence[int]) -> torch.Tensor:
        """[A, Hidden] after one more token of each of `rows_A`."""
        hidden, first = [], 0
        for part in self.parts:
            end = first + len(part.first_BH)
            mine = [i for i, row in enumerate(rows_A) if first <= row < end]
            if mine:
                hidden.append(part.step([rows_A[i] - first for i in mine], [tokens_A[i] for i in mine]))
            first = end
        self.rows_A, self.step = rows_A, self.step + 1
        return torch.cat(hidden)


class Decodings:
    """The decodings of all sessions. Every rank sees the same requests, so all of them hold and drop the same."""

    def __init__(self, teacher: Teacher, *, max_batch_tokens: int, max_cache_tokens: int) -> None:
        self._teacher, self._batch, self._limit = teacher, max_batch_tokens, max_cache_tokens
        self._held: dict[int, _Held] = {}
        """session -> its decoding, the longest unused first."""

    def open(self, request: Request) -> torch.Tensor:
        """Prefill, then feed what the growing responses already have. [A, Hidden] predicts their next token."""
        self._held.pop(request.owner, None)
        free = self._limit - sum(held.opened.cache_tokens for held in self._held.values())
        while self._held and free < request.cache_tokens:
            free += (dropped := self._held.pop(next(iter(self._held))).opened.cache_tokens)
            if dist.get_rank() == 0:
                said = (
                    "%d tokens of one session are dropped for another's %d, and decoded again: raise max_cache_tokens"
                )
                logger.warning(said, dropped, request.cache_tokens)
        rows = within(request.groups, lambda group: len(group.prompt), self._batch)
        parts = [Decoding(self._teacher, row, request.samples, request.max_new_tokens) for row in rows]
        held = _Held(request, parts, request.rows_A)
        hidden = torch.cat([part.first_BH for part in parts])[list(request.rows_A)]
        responses = [response for group in request.groups for response in group.responses]
        for step in range(request.step):
            hidden = held.advance(request.rows_A, [responses[b][step] for b in request.rows_A])
        self._held[request.owner] = held
        return hidden

    def next(self, request: Request) -> torch.Tensor:
        """[A, Hidden] after one more token; StateLost where that does not go on from what is held."""
        held = self._held.get(request.owner)
        if held is None or held.opened.handle != request.handle or held.step != request.step:
            raise StateLost("this decoding is not held here, or is at another step")
        if held.step >= held.opened.max_new_tokens or not set(request.rows_A) <= set(held.rows_A):
            raise StateLost("this decoding has no room for these tokens, or has ended these responses")
        self._held[request.owner] = self._held.pop(request.owner)
        return held.advance(request.rows_A, request.ids)

    def release(self, request: Request) -> None:
        """Forget a session's decoding; handle 0 means whichever it is."""
        held = self._held.get(request.owner)
        if held is not None and request.handle in (0, held.opened.handle):
            del self._held[request.owner]
