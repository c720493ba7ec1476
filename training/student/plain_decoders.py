"""Decoding for models that cannot be packed: every response carries its prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from inference.attention.packing import Group, pack_row
from training.student.policy import Policy, backbone


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
        # Layers of one kind or of several, recurrent ones too: the configuration says which.
        self._cache = DynamicCache(config=policy.config.get_text_config())
        # Whether a layer has a window, the class says by its mask: Llama's has none where config.json names one, and
        # would miss the keys that a cache of that window lets go.
        layers = self._cache.layers
        self._cache.layers = [DynamicLayer() if type(x) is DynamicSlidingWindowLayer else x for x in layers]
        self.first_BV = self._logits(tokens_NP.repeat_interleave(group_size, 0).to(self._device))

    def advance(self, rows_A: torch.Tensor, tokens_A: torch.Tensor) -> torch.Tensor:
        kept = torch.searchsorted(self._rows, rows_A).to(self._device)
        # Recurrent layers keep what they were made for.
        leave = len(kept) < len(self._rows) and all(type(one) is DynamicLayer for one in self._cache.layers)
        if leave:
            self._cache.batch_select_indices(kept)
            self._mask, self._rows = self._mask[kept], rows_A
            kept = torch.arange(len(kept), device=self._device)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._rows), 1)], 1)
        # Where a layer's cache cannot let responses go, finished ones stay, and nobody reads what comes of them.
        tokens = tokens_A.new_zeros(len(self._rows), 1).to(self._device)
        tokens[kept, 0] = tokens_A.to(self._device)
        return self._logits(tokens)[kept]

    def _logits(self, tokens_AL: torch.Tensor) -> torch.Tensor:
        """[A, V] logits after the last of the given tokens."""
        # Positions are counted from the mask: left padding moves none (trap 18). Alibi counts them itself.
        places = {}
        if getattr(self._policy.config, "model_type", "") != "bloom":
            places["position_ids"] = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -tokens_AL.shape[1] :]
        out = backbone(self._policy.model)(
            input_ids=tokens_AL, attention_mask=self._mask, past_key_values=self._cache, use_cache=True, **places
        )
        return self._policy.logits(out.last_hidden_state[:, -1])


class UncachedDecoder:
    """Every response is computed from its prompt on at each step: slow, and right whatever the model keeps of it."""

    def __init__(self, policy: Policy, prompts: Sequence[tuple[int, ...]], group_size: int) -> None:
        self._policy = policy
        self._device = next(policy.parameters()).device
        self._tokens = {row: list(prompts[row // group_size]) for row in range(len(prompts) * group_size)}
        self.first_BV = self._logits(list(self._tokens))

    def advance(self, rows_A: torch.Tensor, tokens_A: torch.Tensor) -> torch.Tensor:
        for row, token in zip(rows_A.tolist(), tokens_A.tolist(), strict=True):
            self._tokens[row].append(token)
        return self._logits(rows_A.tolist())

    def _logits(self, rows: list[int]) -> torch.Tensor:
        """[A, V] logits after the last token of each."""
        # The token behind the last one is predicted from there, whichever it is.
        groups = [Group(tuple(self._tokens[row]), ((0,),), place) for place, row in enumerate(rows)]
        return self._policy.logits(self._policy.response_states(pack_row(groups).to(self._device)))
