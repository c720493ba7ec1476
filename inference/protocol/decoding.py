"""A decoding of the teacher as its client keeps it, so that it can go on with a server that has lost it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import torch

from inference.protocol.wire import Request

Make = Callable[[list[torch.Tensor]], Any]
"""From a reply's tensors to what the client hands out."""
Replay = Callable[[], Request]
"""The request that gives the same answer on a server that has lost the decoding."""


class TeacherDecoding:
    """Responses that grow by one token a step. `first` predicts the token that comes first.

    What predicts is [A, Hidden] of the A responses that still grow, in the teacher's dtype: hidden @ output_layer.T are
    all logits.
    """

    def __init__(self, ask: Callable[[Request, Make, Replay | None], Future[Any]], opening: Request) -> None:
        self._ask, self._opening = ask, opening
        self._tokens: list[list[int]] = [[] for _ in opening.rows_A]
        self._step = 0
        self.first: Future[torch.Tensor] = ask(opening, lambda t: t[0], None)

    def next(self, rows: Sequence[int], tokens: Sequence[int]) -> Future[torch.Tensor]:
        """What follows once `tokens[i]` was chosen for response `rows[i]`; rows ascend.

        A row that is left out is finished and must not come back.
        """
        rows_A, chosen, step = tuple(rows), tuple(tokens), self._step
        for row, token in zip(rows_A, chosen, strict=True):
            if len(self._tokens[row]) != step:
                raise ValueError(f"response {row} was left out of an earlier step")
            self._tokens[row].append(token)
        self._step += 1
        request = Request("next", handle=self._opening.handle, step=step, rows_A=rows_A, ids=chosen)
        return self._ask(request, lambda t: t[0], lambda: self._reopening(rows_A, step + 1))

    def close(self) -> Future[None]:
        """Give the server's memory back; a new decoding or the end of the session does that too."""
        return self._ask(Request("release", handle=self._opening.handle), lambda _: None, None)

    def _reopening(self, rows_A: tuple[int, ...], step: int) -> Request:
        """The request that brings this decoding back to where `rows_A` have `step` tokens."""
        alive, samples = set(rows_A), self._opening.samples
        responses = [tuple(tokens[:step]) if b in alive else () for b, tokens in enumerate(self._tokens)]
        groups = tuple(
            replace(group, responses=tuple(responses[n * samples : (n + 1) * samples]))
            for n, group in enumerate(self._opening.groups)
        )
        return replace(self._opening, groups=groups, rows_A=rows_A, step=step)
