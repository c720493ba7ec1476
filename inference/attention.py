"""Grouped attention: one function for the student, the reference, the critic, the teacher and the sampler.

A plan knows which token may see which. `PackedPlan` serves a packed row (inference/packing.py), `PrefillPlan` is a
packed row of prompts that keeps keys and values, and `DecodePlan` lets one query of each response see the one shared
cache of its prompt and its own suffix. Models call `plan.attend` in place of their own attention.
Shapes: T tokens in the row, H query heads, H_kv key-value heads (H_kv divides H), D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from inference.packing import PackedRow

NAME = "grpo_kd_grouped"
"""Name of this attention in transformers' registry."""


class AttentionPlan(Protocol):
    """What a model needs: attention over a row whose structure the plan knows."""

    def attend(
        self,
        layer: int,
        query_THD: torch.Tensor,
        key_TKD: torch.Tensor,
        value_TKD: torch.Tensor,
        *,
        scale: float,
        window: int | None = None,
    ) -> torch.Tensor:
        """Attention output [T, H, D]. `window`: a token sees itself and the `window` - 1 before it. None: all."""
        ...


class _Block:
    """Queries of a row, padded to [N, L], with the keys that they may see, padded to [N, M]; run as one batch."""

    def __init__(self, row: PackedRow, queries: list[list[int]], keys: list[list[int]]) -> None:
        device = row.tokens_T.device
        self.query_NL, self.valid_NL = _padded(queries, device)
        self.key_NM, key_valid_NM = _padded(keys, device)
        i_seg, j_seg = row.segments_T[self.query_NL][:, :, None], row.segments_T[self.key_NM][:, None, :]
        self._seen_NLM = ((j_seg == 0) | (j_seg == i_seg)) & key_valid_NM[:, None, :]
        self._distance_NLM = row.positions_T[self.query_NL][:, :, None] - row.positions_T[self.key_NM][:, None, :]
        self._masks: dict[int | None, torch.Tensor] = {}

    def mask(self, window: int | None) -> torch.Tensor:
        """bool [N, 1, L, M], true where query i may see key j."""
        if window not in self._masks:
            allowed = self._seen_NLM & (self._distance_NLM >= 0)
            if window is not None:
                allowed &= self._distance_NLM < window
            # A padded query sees everything (its output is dropped): an all-masked softmax row would be NaN.
            self._masks[window] = (allowed | ~self.valid_NL[:, :, None])[:, None]
        return self._masks[window]


def _padded(lists: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices as int64 [N, L] and which of them are real, bool [N, L].

    A padded slot repeats the first index of its own list: nothing of it is kept, so no gradient reaches that token
    through it, and a NaN stays in its group (softmax weight 0 times NaN is NaN).
    """
    longest = max(len(one) for one in lists)
    index = torch.tensor([one + [one[0]] * (longest - len(one)) for one in lists], dtype=torch.int64, device=device)
    lengths = torch.tensor([len(one) for one in lists], device=device)
    return index, torch.arange(longest, device=device)[None, :] < lengths[:, None]


def _parts(row: PackedRow) -> list[tuple[list[int], list[list[int]]]]:
    """Row indices of each group's prompt, and of each of its responses that has inputs."""
    segments, start, parts = row.segments_T.tolist(), 0, []
    for length in row.group_lengths:
        members: dict[int, list[int]] = {}
        for i in range(start, start + length):
            members.setdefault(segments[i], []).append(i)
        parts.append((members.pop(0), list(members.values())))
        start += length
    return parts


class PackedPlan:
    """Attention within each group of a packed row: the prompt is causal, a response sees the prompt and itself.

    Either each group is one padded block, in which responses are masked from each other; or, where the responses'
    copies of their prompt's keys would be fewer than the row's tokens, prompts are one block and responses another,
    so that no work is done between responses. Only attention is padded, nothing else.
    """

    def __init__(self, row: PackedRow) -> None:
        parts = _parts(row)
        copies = sum(len(prompt) * len(responses) for prompt, responses in parts)
        if 0 < copies <= len(row.tokens_T):
            prompts = [prompt for prompt, _ in parts]
            queries = [response for _, responses in parts for response in responses]
            keys = [[*prompt, *response] for prompt, responses in parts for response in responses]
            self._blocks = [_Block(row, prompts, prompts), _Block(row, queries, keys)]
        else:
            groups = [[*prompt, *(i for response in responses for i in response)] for prompt, responses in parts]
            self._blocks = [_Block(row, groups, groups)]
        order = torch.cat([block.query_NL[block.valid_NL] for block in self._blocks])
        self._place_T = torch.argsort(order)

    def attend(
        self,
        layer: int,
        query_THD: torch.Tensor,
        key_TKD: torch.Tensor,
        value_TKD: torch.Tensor,
        *,
        scale: float,
        window: int | None = None,
    ) -> torch.Tensor:
        """See `AttentionPlan.attend`."""
        repeat = query_THD.shape[1] // key_TKD.shape[1]
        outputs = []
        for block in self._blocks:
            query = query_THD[block.query_NL].transpose(1, 2)
            key, value = key_TKD[block.key_NM].transpose(1, 2), value_TKD[block.key_NM].transpose(1, 2)
            self._keep(layer, key, value)
            if repeat > 1:
                key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=block.mask(window), scale=scale)
            outputs.append(out.transpose(1, 2)[block.valid_NL])
        return torch.cat(outputs)[self._place_T]

    def _keep(self, layer: int, key_NKLD: torch.Tensor, value_NKLD: torch.Tensor) -> None:
        """Nothing to keep; `PrefillPlan` does (its rows have no responses, so one block)."""


@dataclass(frozen=True)
class PromptCache:
    """Keys and values of N prompts, computed once, shared by the responses of each."""

    lengths_N: torch.Tensor
    """int64 [N] prompt tokens."""
    keys: dict[int, torch.Tensor]
    """layer -> [N, H_kv, P, D], right-padded."""
    values: dict[int, torch.Tensor]
    """layer -> [N, H_kv, P, D], right-padded."""


class PrefillPlan(PackedPlan):
    """A packed row of prompts that keeps the keys and values of every layer."""

    def __init__(self, row: PackedRow) -> None:
        super().__init__(row)
        lengths = torch.tensor(row.group_lengths, device=row.tokens_T.device)
        self.cache = PromptCache(lengths_N=lengths, keys={}, values={})

    def _keep(self, layer: int, key_NKLD: torch.Tensor, value_NKLD: torch.Tensor) -> None:
        self.cache.keys[layer] = key_NKLD.contiguous()
        self.cache.values[layer] = value_NKLD.contiguous()


class DecodePlan:
    """One query of each active response against its prompt's cache and its own preallocated suffix.

    The prompt's cache is never copied or expanded. All responses of a batch are at the same step t; finished ones
    leave the row (`rows_A`), so only attention, and no matrix product of the model, still sees their slots.
    """

    def __init__(self, prompts: PromptCache, group_size: int, max_new_tokens: int) -> None:
        self._prompts = prompts
        self._group = group_size
        self._max_new = max_new_tokens
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}
        self._rows_A = torch.empty(0, dtype=torch.int64)
        self._step = -1

    def advance(self, rows_A: torch.Tensor) -> torch.Tensor:
        """Start the next step with the active responses `rows_A` (int64 [A], indices in [0, N*G)).

        Returns their positions, int64 [A].
        """
        self._step += 1
        if self._step >= self._max_new:
            raise ValueError(f"step {self._step} is past the {self._max_new} preallocated slots")
        self._rows_A = rows_A
        return self._prompts.lengths_N[rows_A // self._group] + self._step

    def attend(
        self,
        layer: int,
        query_THD: torch.Tensor,
        key_TKD: torch.Tensor,
        value_TKD: torch.Tensor,
        *,
        scale: float,
        window: int | None = None,
    ) -> torch.Tensor:
        """See `AttentionPlan.attend`; T = A active responses, one query each."""
        prompt_key, prompt_value = self._prompts.keys[layer], self._prompts.values[layer]
        N, K, P, D = prompt_key.shape
        B, heads = N * self._group, query_THD.shape[1]
        per_kv = heads // K
        if layer not in self._keys:
            self._keys[layer] = prompt_key.new_zeros(B, K, self._max_new, D)
            self._values[layer] = prompt_key.new_zeros(B, K, self._max_new, D)
        step = self._step
        self._keys[layer][self._rows_A, :, step] = key_TKD
        self._values[layer][self._rows_A, :, step] = value_TKD
        query = query_THD.new_zeros(B, heads, D)
        query[self._rows_A] = query_THD * scale

        by_prompt = query.view(N, self._group, K, per_kv, D).transpose(1, 2).reshape(N * K, self._group * per_kv, D)
        prompt_scores = by_prompt @ prompt_key.view(N * K, P, D).transpose(1, 2)
        prompt_scores = prompt_scores.view(N, K, self._group, per_kv, P).transpose(1, 2).reshape(B * K, per_kv, P)
        suffix_key = self._keys[layer].view(B * K, self._max_new, D)[:, : step + 1]
        suffix_value = self._values[layer].view(B * K, self._max_new, D)[:, : step + 1]
        suffix_scores = query.view(B * K, per_kv, D) @ suffix_key.transpose(1, 2)

        blocked = self._blocked(window, P).repeat_interleave(self._group * K, 0)
        scores = torch.cat([prompt_scores.masked_fill(blocked[:, None, :P], -torch.inf), suffix_scores], -1)
        if window is not None and step >= window:
            scores[:, :, P : P + step - window + 1] = -torch.inf
        weights = scores.float().softmax(-1).to(query.dtype)
        weights_prompt = weights[..., :P].view(N, self._group, K, per_kv, P).transpose(1, 2)
        out_prompt = weights_prompt.reshape(N * K, self._group * per_kv, P) @ prompt_value.view(N * K, P, D)
        out_prompt = out_prompt.view(N, K, self._group, per_kv, D).transpose(1, 2).reshape(B, heads, D)
        out_suffix = (weights[..., P:] @ suffix_value).view(B, heads, D)
        return (out_prompt + out_suffix)[self._rows_A]

    def _blocked(self, window: int | None, longest: int) -> torch.Tensor:
        """bool [N, P], true where a prompt slot is padding or has left the window."""
        lengths = self._prompts.lengths_N[:, None]
        column = torch.arange(longest, device=lengths.device)[None]
        blocked = column >= lengths
        if window is not None:
            blocked |= lengths + self._step - column >= window
        return blocked


def _transformers_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    plan: AttentionPlan | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [1, H, T, D] in, output [1, T, H, D] out."""
    if plan is None:
        raise ValueError(f"attention '{NAME}' needs a plan: call the model with plan=PackedPlan(row)")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    layer: int = module.layer_idx  # type: ignore[assignment]
    out = plan.attend(
        layer,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale=scale,
        window=sliding_window,
    )
    return out[None], None


def register_with_transformers() -> str:
    """Add grouped attention to transformers' registry; returns its name for `attn_implementation`.

    No mask function is registered under that name, so transformers builds none: the plan is the mask.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _transformers_attention)
    return NAME
