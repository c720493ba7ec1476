"""The student's decoding step: against a shared prompt cache, or in plain rows (training/student/plain_decoders.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from inference.attention.grouped import DecodePlan, PrefillPlan, PromptCache
from inference.attention.packing import Group, pack_row
from training.student.plain_decoders import PlainDecoder, UncachedDecoder
from training.student.policy import Policy, Way


class Decoder(Protocol):
    """N prompts with G responses each, one token at a time; B = N*G."""

    first_BV: torch.Tensor
    """[B, V] logits of each response's first token, in the model's type."""

    def advance(self, rows_A: torch.Tensor, tokens_A: torch.Tensor) -> torch.Tensor:
        """[A, V] logits after `tokens_A` (int64) were chosen for the responses `rows_A` (int64, ascending).

        A response that is left out is finished and does not come back.
        """
        ...


def make_decoder(policy: Policy, prompts: Sequence[tuple[int, ...]], group_size: int, longest: int) -> Decoder:
    """The decoder that the model can take."""
    if policy.way is Way.PACKED:
        return GroupedDecoder(policy, prompts, group_size, longest)
    return (PlainDecoder if policy.way is Way.PLAIN else UncachedDecoder)(policy, prompts, group_size)


def prefilled(policy: Policy, prompts: Sequence[tuple[int, ...]], group_size: int) -> tuple[PromptCache, torch.Tensor]:
    """Keys and values of the prompts, and the logits [B, V] of each response's first token."""
    row = pack_row([Group(prompt=tuple(p), responses=()) for p in prompts]).to(next(policy.parameters()).device)
    prefill = PrefillPlan(row)
    hidden = policy.hidden(row.tokens_T, row.positions_T, prefill)
    last = torch.cumsum(prefill.cache.lengths_N, 0) - 1
    return prefill.cache, policy.logits(hidden[last]).repeat_interleave(group_size, 0)


class GroupedDecoder:
    """Each prompt is prefilled once; its responses decode against that one cache, each with a suffix of its own."""

    def __init__(self, policy: Policy, prompts: Sequence[tuple[int, ...]], group_size: int, longest: int) -> None:
        self._policy = policy
        self._device = next(policy.parameters()).device
        cache, self.first_BV = prefilled(policy, prompts, group_size)
        self._plan = DecodePlan(cache, group_size, longest)

    def advance(self, rows_A: torch.Tensor, tokens_A: torch.Tensor) -> torch.Tensor:
        """See `Decoder.advance`."""
        positions_A = self._plan.advance(rows_A.to(self._device))
        return self._policy.logits(self._policy.hidden(tokens_A.to(self._device), positions_A, self._plan))
