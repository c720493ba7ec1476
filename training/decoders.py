"""The student's decoding step: against a shared prompt cache, or for models that cannot be packed, in plain rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from transformers import DynamicCache

from inference.attention import DecodePlan, PrefillPlan
from inference.packing import Group, pack_row
from training.policy import Policy


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
    if policy.grouped:
        return GroupedDecoder(policy, prompts, group_size, longest)
    return PlainDecoder(policy, prompts, group_size)


class GroupedDecoder:
    """Each prompt is prefilled once; its responses decode against that one cache, each with a suffix of its own."""

    def __init__(self, policy: Policy, prompts: Sequence[tuple[int, ...]], group_size: int, longest: int) -> None:
        self._policy = policy
        self._device = next(policy.parameters()).device
        row = pack_row([Group(prompt=tuple(p), responses=()) for p in prompts]).to(self._device)
        prefill = PrefillPlan(row)
        hidden = policy.hidden(row.tokens_T, row.positions_T, prefill)
        last = torch.cumsum(prefill.cache.lengths_N, 0) - 1
        self.first_BV = policy.logits(hidden[last]).repeat_interleave(group_size, 0)
        self._plan = DecodePlan(prefill.cache, group_size, longest)

    def advance(self, rows_A: torch.Tensor, tokens_A: torch.Tensor) -> torch.Tensor:
        """See `Decoder.advance`."""
        positions_A = self._plan.advance(rows_A.to(self._device))
        return self._policy.logits(self._policy.hidden(tokens_A.to(self._device), positions_A, self._plan))


class PlainDecoder:
    """Every response carries its prompt, left-padded, with transformers' own cache and attention."""

    def __init__(self, policy: Policy, prompts: Sequence[tuple[int, ...]], group_size: int) -> None:
        self._policy = policy
        self._device = next(policy.parameters()).device
        longest = max(len(p) for p in prompts)
        tokens_NP = torch.tensor([[p[0]] * (longest - len(p)) + list(p) for p in prompts])
        mask_NP = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        self._rows = torch.arange(len(prompts) * group_size)
        self._mask = mask_NP.repeat_interleave(group_size, 0).to(self._device)
        self._cache = DynamicCache()
        self.first_BV = self._logits(tokens_NP.repeat_interleave(group_size, 0).to(self._device))

    def advance(self, rows_A: torch.Tensor, tokens_A: torch.Tensor) -> torch.Tensor:
        """See `Decoder.advance`."""
        if len(rows_A) < len(self._rows):
            kept = torch.searchsorted(self._rows, rows_A).to(self._device)
            self._cache.batch_select_indices(kept)
            self._mask, self._rows = self._mask[kept], rows_A
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(rows_A), 1)], 1)
        return self._logits(tokens_A[:, None].to(self._device))

    def _logits(self, tokens_AL: torch.Tensor) -> torch.Tensor:
        """[A, V] logits after the last of the given tokens."""
        # Positions are counted from the mask: left padding moves none (trap 18). Alibi counts them itself.
        places = {}
        if getattr(self._policy.config, "model_type", "") != "bloom":
            places["position_ids"] = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -tokens_AL.shape[1] :]
        out = self._policy.model.base_model(
            input_ids=tokens_AL, attention_mask=self._mask, past_key_values=self._cache, use_cache=True, **places
        )
        return self._policy.logits(out.last_hidden_state[:, -1])
