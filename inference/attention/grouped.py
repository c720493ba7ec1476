"""Grouped attention: one function for the student, the reference, the critic, the teacher and the sampler.

A plan knows which token may see which, and models call `plan.attend` in place of their own attention: `PackedPlan` for
a packed row, `PrefillPlan` for one of prompts (inference/attention/packed.py), and `DecodePlan` for one token of each
response (inference/attention/decode.py).
Shapes: T tokens in the row, H query heads, H_kv key-value heads (H_kv divides H), D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

NAME = "grpo_kd_grouped"
"""Name of this attention in transformers' registry."""


UNKNOWN = ("s_aux", "sinks", "position_bias", "indices", "block_indices")
"""What a model may hand to its attention besides what a plan takes: sinks (gpt-oss), biases, sparsity."""


class NotGrouped(ValueError):
    """A model whose attention a plan cannot say."""


@dataclass(frozen=True)
class ScoreRule:
    """How a layer scores keys."""

    scale: float
    """Times query . key."""
    window: int | None = None
    """A token sees itself and the `window` - 1 before it. None: all."""
    softcap: float | None = None
    """Scores are softcap * tanh(score / softcap) (Gemma 2, arXiv 2408.00118, section 2)."""


class AttentionPlan(Protocol):
    """What a model needs: attention over a row whose structure the plan knows."""

    def attend(
        self, layer: int, query_THD: torch.Tensor, key_TKD: torch.Tensor, value_TKD: torch.Tensor, rule: ScoreRule
    ) -> torch.Tensor:
        """Attention output [T, H, D]."""


def _transformers_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    plan: AttentionPlan | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [1, H, T, D] in, output [1, T, H, D] out.

    Raises NotGrouped for attention that a plan does not say: whoever called the model then leaves packed rows.
    """
    if plan is None:
        raise NotGrouped(f"attention '{NAME}' needs a plan: call the model with plan=PackedPlan(row)")
    unknown = [name for name in UNKNOWN if kwargs.get(name) is not None]
    if unknown or _hidden_window(module, sliding_window):
        raise NotGrouped(f"grouped attention does not know {', '.join(unknown) or 'a window that only a mask says'}")
    rule = ScoreRule(scaling if scaling is not None else query.shape[-1] ** -0.5, sliding_window, softcap)
    layer: int = module.layer_idx  # type: ignore[assignment]
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return plan.attend(layer, query, key, value, rule)[None], None


def _hidden_window(module: torch.nn.Module, window: int | None) -> bool:
    """Whether the layer does not see everything before it, and only transformers' mask, which is not made, says so."""
    types, layer = getattr(module.config, "layer_types", None), module.layer_idx
    if not types:  # PhiMoE
        return window is None and getattr(module.config, "sliding_window", None) is not None
    kind = types[layer] if isinstance(layer, int) and layer < len(types) else "full_attention"
    return kind == "chunked_attention" or (kind == "sliding_attention" and window is None)


def register_with_transformers() -> str:
    """Add grouped attention to transformers' registry; returns its name for `attn_implementation`.

    No mask function is registered under that name, so transformers builds none: the plan is the mask.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _transformers_attention)
    return NAME
