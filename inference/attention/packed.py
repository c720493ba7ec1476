"""Plans for packed rows: groups with their responses, and prompts alone, whose keys and values are kept."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from inference.attention.blocks import Block, Part, alike, parts_of
from inference.attention.grouped import ScoreRule
from inference.attention.packing import PackedRow
from inference.attention.varlen import LARGEST_HEAD, VarlenLayout, flash_attention


class PackedPlan:
    """Attention within each group of a packed row: the prompt is causal, a response sees the prompt and itself.

    Prompts are one padded block. Responses are another, whose queries see the one copy of their prompt's keys and their
    own (inference/attention/prompt_cache.py): no work is done between responses, and no prompt is copied. Only
    attention is padded, nothing else, and groups of very different lengths are not padded to each other. On CUDA a
    half-precision row goes through flash-attn's or torch's variable-length kernel where there is one
    (inference/attention/varlen.py).
    """

    def __init__(self, row: PackedRow) -> None:
        self._parts, self._device = parts_of(row), row.tokens_T.device

    @cached_property
    def _varlen(self) -> VarlenLayout:
        return VarlenLayout(self._parts, self._device)

    @cached_property
    def _blocks(self) -> list[Block]:
        return [Block(one, self._device) for one in self._together()]

    @cached_property
    def _place_T(self) -> torch.Tensor | None:
        """Place of each of the row's tokens in what the blocks give; None: they give them in the row's order."""
        tokens = [i for block in self._blocks for i in block.tokens]
        in_order = tokens == list(range(len(tokens)))
        return None if in_order else torch.argsort(torch.tensor(tokens, dtype=torch.int64, device=self._device))

    def _together(self) -> list[list[Part]]:
        """The groups of each block."""
        return alike(self._parts, self._device)

    def attend(
        self, layer: int, query_THD: torch.Tensor, key_TKD: torch.Tensor, value_TKD: torch.Tensor, rule: ScoreRule
    ) -> torch.Tensor:
        kernel = flash_attention(self._device)
        taken = query_THD.dtype in (torch.bfloat16, torch.float16) and query_THD.shape[-1] <= LARGEST_HEAD
        if kernel is not None and taken and rule.softcap is None:
            if isinstance(self, PrefillPlan):  # nobody else wants them as a block
                self._keep(layer, self._blocks[0], key_TKD, value_TKD)
            return self._varlen.attend(kernel, query_THD, key_TKD, value_TKD, scale=rule.scale, window=rule.window)
        outputs: list[torch.Tensor] = []
        for block in self._blocks:
            prompt_cache = self._keep(layer, block, key_TKD, value_TKD)
            outputs += block.attend(query_THD, key_TKD, value_TKD, prompt_cache, rule)
        whole = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return whole if self._place_T is None else whole.index_select(0, self._place_T)

    def _keep(
        self, layer: int, block: Block, key_TKD: torch.Tensor, value_TKD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a block's prompts; `PrefillPlan` keeps them."""
        return block.prompt_cache(key_TKD, value_TKD)


@dataclass(frozen=True)
class PromptCache:
    """Keys and values of N prompts, computed once, shared by the responses of each."""

    lengths: tuple[int, ...]
    """Prompt tokens of each of the N prompts, as the host knows them."""
    lengths_N: torch.Tensor
    """int64 [N] the same on the device."""
    keys: dict[int, torch.Tensor]
    """layer -> [N, H_kv, P, D], right-padded."""
    values: dict[int, torch.Tensor]
    """layer -> [N, H_kv, P, D], right-padded."""

    @property
    def longest(self) -> int:
        """P."""
        return next(iter(self.keys.values())).shape[2]


class PrefillPlan(PackedPlan):
    """A packed row of prompts that keeps the keys and values of every layer."""

    def __init__(self, row: PackedRow) -> None:
        super().__init__(row)
        lengths_N = torch.tensor(row.group_lengths, device=row.tokens_T.device)
        self.cache = PromptCache(row.group_lengths, lengths_N, keys={}, values={})

    def _together(self) -> list[list[Part]]:
        return [self._parts]

    def _keep(
        self, layer: int, block: Block, key_TKD: torch.Tensor, value_TKD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.cache.keys[layer], self.cache.values[layer] = kept = super()._keep(layer, block, key_TKD, value_TKD)
        return kept
