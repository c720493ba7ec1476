"""Decoding: prompts are prefilled once, and their responses grow against that cache, on every rank alike.

`Decoding` serves `generate`, which runs to the end in one request, and `next`, where the client chooses each token and
the cache waits between requests. What waits is bounded: one decoding for each session, `max_cache_tokens` in all, and
the longest unused goes first. A client whose decoding is gone opens it again with the tokens chosen so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from inference.attention import DecodePlan, PrefillPlan
from inference.packing import Group, pack_row
from inference.teacher import Teacher
from inference.wire import Request, StateLost, cache_tokens, rows_and_tokens


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
        positions = self._plan.advance(torch.tensor(rows_A, device=device))
        return self._teacher.forward(torch.tensor(tokens_A, device=device), positions, self._plan)


@dataclass
class _Held:
    """The decoding of a session."""

    handle: int
    parts: list[tuple[int, Decoding]]
    """(first response, its packed row)."""
    rows: tuple[int, ...]
    """Responses that still grow."""
    step: int
    max_new_tokens: int
    tokens: int
    """What it counts against `max_cache_tokens`."""

    def advance(self, rows: tuple[int, ...], tokens: Sequence[int]) -> torch.Tensor:
        """[A, Hidden] after one more token of each of `rows`."""
        hidden = []
        ends = [first for first, _ in self.parts[1:]] + [1 << 62]
        for (first, decoding), end in zip(self.parts, ends, strict=True):
            mine = [i for i, row in enumerate(rows) if first <= row < end]
            if mine:
                hidden.append(decoding.step([rows[i] - first for i in mine], [tokens[i] for i in mine]))
        self.rows, self.step = rows, self.step + 1
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
        need = cache_tokens(request)
        while self._held and sum(held.tokens for held in self._held.values()) + need > self._limit:
            del self._held[next(iter(self._held))]
        parts: list[list[Group]] = []
        row: list[Group] = []
        used = 0
        for group in request.groups:
            if row and used + len(group.prompt) > self._batch:
                parts.append(row)
                row, used = [], 0
            row.append(group)
            used += len(group.prompt)
        held = _Held(
            handle=request.handle,
            parts=[
                (part[0].first_response, Decoding(self._teacher, part, request.samples, request.max_new_tokens))
                for part in [*parts, row]
            ],
            rows=request.extras,
            step=0,
            max_new_tokens=request.max_new_tokens,
            tokens=need,
        )
        hidden = torch.cat([decoding.first_BH for _, decoding in held.parts])[list(request.extras)]
        responses = [response for group in request.groups for response in group.responses]
        for step in range(request.step):
            hidden = held.advance(request.extras, [responses[row][step] for row in request.extras])
        self._held[request.owner] = held
        return hidden

    def next(self, request: Request) -> torch.Tensor:
        """[A, Hidden] after one more token; StateLost where that does not go on from what is held."""
        held = self._held.get(request.owner)
        rows, tokens = rows_and_tokens(request)
        if held is None or held.handle != request.handle or held.step != request.step:
            raise StateLost("this decoding is not held here, or is at another step")
        if held.step >= held.max_new_tokens or not set(rows) <= set(held.rows):
            raise StateLost("this decoding has no room for these tokens, or has ended these responses")
        self._held[request.owner] = self._held.pop(request.owner)
        return held.advance(rows, tokens)

    def release(self, request: Request) -> None:
        """Forget a session's decoding; handle 0 means whichever it is."""
        held = self._held.get(request.owner)
        if held is not None and request.handle in (0, held.handle):
            del self._held[request.owner]
