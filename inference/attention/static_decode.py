"""Decoding against a prompt cache by a captured CUDA graph (training/student/graph_decoder.py)."""

from __future__ import annotations

import torch

from inference.attention.decode import DecodePlan
from inference.attention.packed import PromptCache


class StaticDecodePlan(DecodePlan):
    """`DecodePlan` as a CUDA graph needs it: the step is a tensor, a query reads a fixed number of its own slots, and
    every response stays in the batch. Shapes and the host's part are the same in each step."""

    def __init__(self, prompts: PromptCache, group_size: int, max_new_tokens: int) -> None:
        super().__init__(prompts, group_size, max_new_tokens)
        self._everybody = True
        self._first_B = prompts.lengths_N.repeat_interleave(group_size)
        self.step_1 = torch.zeros(1, dtype=torch.int64, device=prompts.lengths_N.device)
        """int64 [1] the slot that the next pass writes; whoever makes the pass counts it on."""

    def begin(self, read: int) -> torch.Tensor:
        """Start a pass in which each response reads its first `read` slots, more than `step_1`. Returns positions,
        int64 [B]."""
        self._read, self._hidden = read, {}
        return self._first_B + self.step_1

    def _write(self, cache_NKGRD: torch.Tensor, new_NKGD: torch.Tensor) -> None:
        cache_NKGRD.index_copy_(3, self.step_1, new_NKGD[:, :, :, None])

    def _blocked(self, window: int | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        slot = torch.arange(self._read, device=self.step_1.device)
        own = slot > self.step_1 if window is None else (slot > self.step_1) | (slot <= self.step_1 - window)
        return self._hidden_prompt(window, self.step_1), own
