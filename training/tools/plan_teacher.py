"""Memory of one tensor-parallel rank of the teacher, from its config.json: weights, one forward pass, decoding cache.

The shapes are those that inference/model/teacher.py builds and inference/model/weights.py cuts. One layer's forward
pass is traced on the meta device (nothing is kept from layer to layer but the residual), with the real attention plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from configs.schema import RunConfig
from inference.attention.grouped import ScoreRule
from inference.attention.packed import PackedPlan
from inference.attention.packing import PackedRow
from inference.model.families import Architecture
from inference.model.weights import kv_groups, padded
from training.student.loading import DTYPES
from training.tools.plan_trace import META, LiveBytes, fused_attention, longest_row


@dataclass(frozen=True)
class TeacherMemory:
    """Bytes of one rank."""

    weights: int
    activations: int
    """Of one packed row of teacher.max_batch_tokens tokens."""
    logits: int
    """Of one chunk, this rank's vocabulary columns, float32; with the row's hidden states."""
    cache: int
    """Keys and values of the answers that it writes itself (evaluation, warm-up, mixed sampling)."""

    @property
    def total(self) -> int:
        """The weights, the cache and the worse of the two moments."""
        return self.weights + self.cache + max(self.activations, self.logits)


def shard_weights(a: Architecture, size: int, element: int) -> int:
    """Bytes of one rank's parameters; norms are float32 whatever the model's type."""
    vocab, ffn = padded(a.vocab_size, size) // size, padded(a.ffn_size, size) // size
    query, qkv = a.heads // size * a.head_dim, _qkv_rows(a, size)
    fc1 = (2 if a.gated else 1) * ffn
    matrices = a.hidden_size * (qkv + query + fc1 + ffn)
    biases = (qkv + a.hidden_size + fc1 + a.hidden_size) if a.linear_bias else qkv * a.qkv_bias
    norm = a.hidden_size * (2 if a.norm == "LayerNorm" else 1)
    norms = norm * (4 if a.post_norms else 2) + (2 * a.head_dim if a.qk_norm else 0)
    outside = vocab * a.hidden_size * (1 if a.tied else 2) + (a.max_positions * a.hidden_size) * a.learned_positions
    layers = len(a.layers)
    return element * (layers * (matrices + biases) + outside) + 4 * (layers * norms + norm)


def plain_weights(model: Any, dtype: str) -> int:
    """Bytes of all parameters of a model that transformers runs, in one process. `model`: its configuration."""
    with META:
        built = AutoModelForCausalLM.from_config(model)
    return DTYPES[dtype].itemsize * sum(parameter.numel() for parameter in built.parameters())


def _qkv_rows(a: Architecture, size: int) -> int:
    return (a.heads + 2 * kv_groups(a, size)) // size * a.head_dim


def teacher_memory(a: Architecture, config: RunConfig, size: int, prompt_tokens: int) -> TeacherMemory:
    """One rank of `size`, for requests of full-length groups."""
    dtype = DTYPES[config.teacher.dtype]
    element = dtype.itemsize
    row = longest_row(config, config.prompts_per_step, prompt_tokens, budget=config.teacher.max_batch_tokens)
    columns = padded(a.vocab_size, size) // size
    chunk = min(config.teacher.logit_chunk, len(row.labels_S))
    hidden = (len(row.tokens_T) + len(row.labels_S)) * a.hidden_size * element
    token = 2 * len(a.layers) * kv_groups(a, size) // size * a.head_dim * element
    cached = max(config.teacher.max_batch_tokens, config.teacher.max_cache_tokens * (config.sampling.teacher_mix > 0))
    return TeacherMemory(
        weights=shard_weights(a, size, element),
        activations=_layer_peak(a, row, size, dtype),
        logits=hidden + chunk * columns * 4,
        cache=cached * token,
    )


@torch.no_grad()
def _layer_peak(a: Architecture, row: PackedRow, size: int, dtype: torch.dtype) -> int:
    """Peak of one layer's forward pass on a packed row, the residual included."""
    ffn, groups = padded(a.ffn_size, size) // size, kv_groups(a, size) // size
    heads, D, H = a.heads // size, a.head_dim, a.hidden_size
    T = len(row.tokens_T)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    qkv, proj = empty(_qkv_rows(a, size), H), empty(H, heads * D)
    fc1, fc2 = empty((2 if a.gated else 1) * ffn, H), empty(H, ffn)
    norm = torch.empty(H, device=META)
    with fused_attention(), LiveBytes() as tracker:
        plan = PackedPlan(row)
        # Teacher.forward holds the embeddings, Megatron's block the layer's input, until the layer is done.
        held = empty(T, H), empty(T, H)
        residual = held[1] * 1.0
        normed = F.rms_norm(residual.float(), (H,), norm).to(dtype)
        q, k, v = (normed @ qkv.T).split([heads * D, groups * D, groups * D], -1)
        query, key = q.reshape(T, heads, D) * 1.0, k.reshape(T, groups, D) * 1.0  # rotated
        out = plan.attend(0, query, key, v.reshape(T, groups, D), ScoreRule(1.0, a.layers[0].window))
        residual = residual + out.reshape(T, heads * D) @ proj.T
        del q, k, v, query, key, out
        normed = F.rms_norm(residual.float(), (H,), norm).to(dtype)
        up = normed @ fc1.T
        if a.gated:
            gate, value = up.chunk(2, -1)
            up = F.silu(gate) * value
        else:
            up = F.gelu(up)
        residual = residual + up @ fc2.T
        del held
    return tracker.peak
