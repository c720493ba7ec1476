"""The teacher: a Megatron-core GPTModel whose attention is ours.

Rotary embedding, windows, packing and the cache live in `GroupedCoreAttention`; the plan of a forward pass
(inference/attention/grouped.py) reaches it through one `ForwardContext` that all layers share. Nothing here needs
Transformer Engine, Apex or CUDA. There is no optimizer, no gradient and no dropout.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F

from configs.io.files import read_json
from inference.attention.grouped import AttentionPlan, ScoreRule
from inference.model.families import Architecture, Rope, family_of, parse_architecture
from inference.model.files import Checkpoint
from inference.model.weights import Cut, kv_groups, load_weights, padded


def _not_compiled(function: Any = None, **_: Any) -> Any:
    """Stands in for torch.compile: the function itself, or a decorator that gives it."""
    return function if function is not None else lambda decorated: decorated


# Megatron compiles its fused kernels while it is imported, for which torch loads all of its compiler: more than half
# of a small teacher's start-up. Nothing here uses these kernels (every fusion is off in `_build`), nor its timers, for
# which it loads TensorBoard where that can be imported.
_board = sys.modules.setdefault("torch.utils.tensorboard", None)  # type: ignore[arg-type]
with warnings.catch_warnings(), mock.patch.object(torch, "compile", _not_compiled):
    warnings.simplefilter("ignore")  # "Apex is not installed", "Transformer Engine is not installed"
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.layers import RowParallelLinear
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig
if _board is None:
    del sys.modules["torch.utils.tensorboard"]

# Its deprecation warnings are about settings that we leave at their defaults.
warnings.filterwarnings("ignore", module=r"megatron\.")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}


@dataclass
class ForwardContext:
    """What the attention of every layer needs to know of the forward pass that is running."""

    architecture: Architecture
    plan: AttentionPlan | None = None
    """Which token sees which."""
    cos_sin: dict[Rope, tuple[torch.Tensor, torch.Tensor]] | None = None
    """Rotary tables of the row's positions, each [T, 1, D]."""


class TeacherNorm(torch.nn.Module):
    """RMSNorm or LayerNorm, computed in float32 with float32 weights whatever the model's type."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.shape, self.eps = (hidden_size,), eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=torch.float32))
        biased = config.normalization == "LayerNorm"
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=torch.float32)) if biased else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., Hidden] in, the same out."""
        if self.bias is None:
            return F.rms_norm(x.float(), self.shape, self.weight, self.eps).to(x.dtype)
        return F.layer_norm(x.float(), self.shape, self.weight, self.bias, self.eps).to(x.dtype)


class NormedRowParallel(RowParallelLinear):
    """Gemma: the output of attention and of the MLP is normed before it joins the residual."""

    def __init__(self, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(*args, config=config, **kwargs)
        self.post_norm = TeacherNorm(config, self.output_size, config.layernorm_epsilon)

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, None]:
        """[T, 1, in / TP] in, [T, 1, Hidden] out."""
        output, _ = super().forward(input_)
        return self.post_norm(output), None


class GroupedCoreAttention(torch.nn.Module):
    """Rotary embedding, then the plan's attention."""

    context: ForwardContext

    def __init__(self, *, config: TransformerConfig, layer_number: int, **_: Any) -> None:
        super().__init__()
        self.layer = layer_number - 1

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """query [T, 1, H, D], key and value [T, 1, H_kv, D] of this rank; returns [T, 1, H * D]."""
        context = self.context
        if context.plan is None or context.cos_sin is None:
            raise RuntimeError("call the model through Teacher.forward")
        settings = context.architecture.layers[self.layer]
        query, key = query[:, 0], key[:, 0]
        if settings.rope is not None:
            cos, sin = context.cos_sin[settings.rope]
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        whole = context.architecture
        rule = ScoreRule(whole.softmax_scale, settings.window, whole.attention_softcap)
        out_THD = context.plan.attend(self.layer, query, key, value[:, 0], rule)
        return out_THD.reshape(out_THD.shape[0], 1, -1)


def rotate(x_THD: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (arXiv 2104.09864) in Hugging Face's layout: the two halves of a head are the pairs."""
    (first, second), (low, high) = x_THD.chunk(2, -1), sin_T1D.chunk(2, -1)
    out = x_THD * cos_T1D
    half = first.shape[-1]
    out[..., :half].addcmul_(second, low, value=-1)
    out[..., half:].addcmul_(first, high)
    return out


def inverse_frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """float32 [D / 2]; `llama3` stretches long wavelengths and leaves short ones (Llama 3.1)."""
    inverse = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if rope.kind == "linear":
        return inverse / rope.factor
    if rope.kind == "default":
        return inverse
    wavelength = 2 * math.pi / inverse
    low = rope.original_max_positions / rope.low_freq_factor
    high = rope.original_max_positions / rope.high_freq_factor
    smooth = (rope.original_max_positions / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - smooth) * inverse / rope.factor + smooth * inverse
    return torch.where(wavelength > low, inverse / rope.factor, torch.where(wavelength < high, inverse, between))


class Teacher:
    """One rank's part of the teacher. `forward` is collective: every rank calls it with the same row."""

    def __init__(self, path: Path, dtype: str, *, device: torch.device | None = None) -> None:
        """Build and load; the default process group is the tensor-parallel group."""
        config = read_json(path / "config.json")
        self.path = path
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        family, checkpoint, described = family_of(config), Checkpoint(path), parse_architecture(config)
        checkpoint.check(family, described)
        self.architecture = replace(described, tied=checkpoint.tied(family, described))
        self.dtype = DTYPES[dtype]
        self.device = device or torch.device("cpu")
        self.vocab_size = self.architecture.vocab_size
        self.context = ForwardContext(self.architecture)
        self.model = self._build()
        load_weights(self.model, checkpoint, family, Cut(self.architecture, self.rank, self.size))
        self.model.to(self.device).requires_grad_(False).eval()
        self._inverse = {
            rope: inverse_frequencies(rope, self.architecture.head_dim).to(self.device)
            for rope in {layer.rope for layer in self.architecture.layers if layer.rope is not None}
        }
        # The factor is rounded to the model's type, as Hugging Face does.
        self._embedding_scale = torch.tensor(self.architecture.embedding_scale, dtype=self.dtype).item()
        weight = self.model.shared_embedding_or_output_weight() if self.architecture.tied else None
        self.output_weight: torch.Tensor = weight if weight is not None else self.model.output_layer.weight
        self.first_column = self.rank * self.output_weight.shape[0]
        self.columns = min(self.output_weight.shape[0], self.vocab_size - self.first_column)
        """Vocabulary entries of this rank; the rest of its rows are padding."""
        if self.columns <= 0:
            raise ValueError(f"a vocabulary of {self.vocab_size} cannot be dealt to {self.size} ranks")

    def _build(self) -> GPTModel:
        a = self.architecture
        config = TransformerConfig(
            num_layers=len(a.layers),
            hidden_size=a.hidden_size,
            num_attention_heads=a.heads,
            num_query_groups=kv_groups(a, self.size),
            kv_channels=a.head_dim,
            ffn_hidden_size=padded(a.ffn_size, self.size),
            activation_func=ACTIVATIONS[a.activation],
            gated_linear_unit=a.gated,
            add_bias_linear=a.linear_bias,
            add_qkv_bias=a.qkv_bias,
            normalization=a.norm,
            layernorm_epsilon=a.norm_eps,
            softmax_scale=a.softmax_scale,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            tensor_model_parallel_size=self.size,
            params_dtype=self.dtype,
            bf16=self.dtype == torch.bfloat16,
            use_cpu_initialization=True,
            perform_initialization=False,
            gradient_accumulation_fusion=False,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            masked_softmax_fusion=False,
            apply_rope_fusion=False,
            persist_layer_norm=False,
        )
        spec = get_gpt_layer_local_spec(normalization=a.norm, qk_layernorm=a.qk_norm)
        spec.submodules.input_layernorm = TeacherNorm
        spec.submodules.pre_mlp_layernorm = TeacherNorm
        attention, mlp = spec.submodules.self_attention.submodules, spec.submodules.mlp.submodules
        attention.core_attention = GroupedCoreAttention
        if a.qk_norm:
            attention.q_layernorm = attention.k_layernorm = TeacherNorm
        if a.post_norms:
            attention.linear_proj = mlp.linear_fc2 = NormedRowParallel
        model = GPTModel(
            config,
            TransformerBlockSubmodules(layer_specs=[spec] * len(a.layers), layer_norm=TeacherNorm),
            vocab_size=padded(a.vocab_size, self.size),
            max_sequence_length=a.max_positions,
            parallel_output=True,
            share_embeddings_and_output_weights=a.tied,
            position_embedding_type="learned_absolute" if a.learned_positions else "none",
            pg_collection=_process_groups(),
        )
        if a.learned_positions:
            model.embedding.position_embeddings.to(self.dtype)
        for layer in model.decoder.layers:
            layer.self_attention.core_attention.context = self.context
        return model

    @contextlib.contextmanager
    def first_layers(self, count: int) -> Iterator[None]:
        """While open, `forward` goes through this many layers only, and the final norm."""
        layers = self.model.decoder.layers
        self.model.decoder.layers = layers[:count]
        try:
            yield
        finally:
            self.model.decoder.layers = layers

    @torch.no_grad()
    def forward(self, tokens_T: torch.Tensor, positions_T: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        """Hidden states after the final norm, [T, Hidden] in the model's type."""
        angles = positions_T.float()[:, None]
        self.context.plan, self.context.cos_sin = plan, {}
        for rope, inverse in self._inverse.items():
            angle = (angles * inverse).repeat(1, 2)[:, None]
            self.context.cos_sin[rope] = angle.cos().to(self.dtype), angle.sin().to(self.dtype)
        hidden = self.model.embedding(input_ids=tokens_T[None], position_ids=positions_T[None])
        if self._embedding_scale != 1.0:
            hidden = hidden * self._embedding_scale
        hidden = self.model.decoder(hidden_states=hidden, attention_mask=None)
        self.context.plan = self.context.cos_sin = None
        return hidden[:, 0]


def _process_groups() -> ProcessGroupCollection:
    """The default group is the tensor-parallel group; every other kind of parallelism has one rank."""
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    groups = ProcessGroupCollection()
    groups.tp = dist.group.WORLD
    for name in ("pp", "cp", "tp_cp", "dp", "dp_cp", "ep", "expt_tp", "expt_dp", "tp_ep", "tp_ep_pp"):
        setattr(groups, name, alone)
    groups.embd = groups.pos_embd = None
    return groups
