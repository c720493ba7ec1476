"""Model families, each one table: from config.json and Hugging Face tensor names to Megatron's parameters and shards.

`Architecture` is read from config.json alone, so a wrong setting is found before anything is loaded; what it leaves out
and the forms that older files have are transformers' business.
A `Weight` says which Hugging Face tensors make one Megatron parameter and how tensor parallelism cuts it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

Shard = Literal["replicated", "norm", "vocab", "column", "row", "gate_up", "qkv", "fused_qkv"]
"""How a parameter is cut over the ranks: not at all (norm: not at all and the family's offset is added), by vocabulary
rows, by output rows, by input columns, gate and up rows side by side, q/k/v rows interleaved by KV group."""


@dataclass(frozen=True)
class Weight:
    """One Megatron parameter. `{i}` in a name stands for the layer."""

    target: str
    """Megatron parameter name; the shape is [out, in] for matrices."""
    sources: tuple[str, ...]
    """Hugging Face tensor names without the checkpoint's prefix, in the order in which they are joined."""
    shard: Shard
    transposed: bool = False
    """The file holds [in, out] (GPT-2's Conv1D)."""


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary embedding of a layer."""

    theta: float
    """Base period."""
    kind: Literal["default", "linear", "llama3"] = "default"
    """Scaling variant."""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True, kw_only=True)
class LayerAttention:
    """What attention layer i does with positions."""

    rope: Rope | None
    """None: positions are learned and added to the embedding."""
    window: int | None
    """A token sees itself and the window - 1 before it. None: all."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Everything that Megatron needs to know of a model; numbers as in config.json unless said otherwise. What most
    families have in common is the default."""

    family: str
    vocab_size: int
    hidden_size: int
    ffn_size: int
    heads: int
    kv_heads: int
    head_dim: int
    activation: Literal["silu", "gelu_tanh", "gelu"]
    gated: bool = True
    """Gate and up projections (SwiGLU, GeGLU)."""
    norm: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    norm_eps: float
    norm_offset: float = 0.0
    """Added to stored norm weights: Gemma stores w where 1 + w is meant."""
    qk_norm: bool = False
    post_norms: bool = False
    """Norms after attention and after the MLP, before the residual is added (Gemma 3)."""
    linear_bias: bool = False
    """All linear layers have a bias (GPT-2)."""
    qkv_bias: bool = False
    """Queries, keys and values alone have one (Qwen 2)."""
    embedding_scale: float = 1.0
    softmax_scale: float
    attention_softcap: float | None = None
    """Attention scores are softcap * tanh(score / softcap) (Gemma 2)."""
    logit_softcap: float | None = None
    """The same of the logits."""
    tied: bool
    """The output layer is the embedding."""
    max_positions: int
    learned_positions: bool = False
    layers: tuple[LayerAttention, ...]


@dataclass(frozen=True, kw_only=True)
class Family:
    """The row of one family."""

    weights: tuple[Weight, ...]
    prefixes: tuple[str, ...]
    """What may stand before the names of `weights` in a checkpoint; the first that fits is used."""
    output: tuple[str, ...] = ("lm_head.weight", "language_model.lm_head.weight")
    """Full names that the untied output layer may have."""
    supported: dict[str, tuple[Any, ...]]
    """Values that a key must have where it is there."""
    read: Callable[[dict[str, Any]], dict[str, Any]]
    """From settings to the fields of `Architecture` that are not read alike for all families."""
    activation_key: str = "hidden_act"


_ATTENTION = "decoder.layers.{i}.self_attention."
_MLP = "decoder.layers.{i}.mlp."


def _decoder(*, qk_norm: bool = False, post_norms: bool = False, qkv_bias: bool = False) -> tuple[Weight, ...]:
    """The Llama layout, with Gemma's and Qwen's additions."""
    layer, attention, mlp = "layers.{i}.", "layers.{i}.self_attn.", "layers.{i}.mlp."
    weights = [
        Weight("embedding.word_embeddings.weight", ("embed_tokens.weight",), "vocab"),
        Weight("decoder.layers.{i}.input_layernorm.weight", (layer + "input_layernorm.weight",), "norm"),
        Weight(_ATTENTION + "linear_qkv.weight", tuple(attention + f"{part}_proj.weight" for part in "qkv"), "qkv"),
        Weight(_ATTENTION + "linear_proj.weight", (attention + "o_proj.weight",), "row"),
        Weight(_MLP + "linear_fc1.weight", (mlp + "gate_proj.weight", mlp + "up_proj.weight"), "gate_up"),
        Weight(_MLP + "linear_fc2.weight", (mlp + "down_proj.weight",), "row"),
        Weight("decoder.final_layernorm.weight", ("norm.weight",), "norm"),
    ]
    if qk_norm:
        weights += [
            Weight(_ATTENTION + f"{part}_layernorm.weight", (attention + f"{part}_norm.weight",), "norm")
            for part in "qk"
        ]
    if qkv_bias:
        sources = tuple(attention + f"{part}_proj.bias" for part in "qkv")
        weights.append(Weight(_ATTENTION + "linear_qkv.bias", sources, "qkv"))
    before_mlp = "pre_feedforward_layernorm.weight" if post_norms else "post_attention_layernorm.weight"
    weights.append(Weight("decoder.layers.{i}.pre_mlp_layernorm.weight", (layer + before_mlp,), "norm"))
    if post_norms:
        weights += [
            Weight(_ATTENTION + "linear_proj.post_norm.weight", (layer + "post_attention_layernorm.weight",), "norm"),
            Weight(_MLP + "linear_fc2.post_norm.weight", (layer + "post_feedforward_layernorm.weight",), "norm"),
        ]
    return tuple(weights)


def _gpt2() -> tuple[Weight, ...]:
    """GPT-2's layout: learned positions, biases, fused and transposed projections."""
    layer = "h.{i}."
    weights = [
        Weight("embedding.word_embeddings.weight", ("wte.weight",), "vocab"),
        Weight("embedding.position_embeddings.weight", ("wpe.weight",), "replicated"),
    ]
    for kind in ("weight", "bias"):
        matrix = kind == "weight"
        weights += [
            Weight(f"decoder.layers.{{i}}.input_layernorm.{kind}", (layer + f"ln_1.{kind}",), "norm"),
            Weight(f"decoder.layers.{{i}}.pre_mlp_layernorm.{kind}", (layer + f"ln_2.{kind}",), "norm"),
            Weight(f"decoder.final_layernorm.{kind}", (f"ln_f.{kind}",), "norm"),
            Weight(_ATTENTION + f"linear_qkv.{kind}", (layer + f"attn.c_attn.{kind}",), "fused_qkv", matrix),
            Weight(_MLP + f"linear_fc1.{kind}", (layer + f"mlp.c_fc.{kind}",), "column", matrix),
            # The bias of a row-parallel layer is added once, after the sum over the ranks.
            Weight(
                _ATTENTION + f"linear_proj.{kind}",
                (layer + f"attn.c_proj.{kind}",),
                "row" if matrix else "replicated",
                matrix,
            ),
            Weight(
                _MLP + f"linear_fc2.{kind}",
                (layer + f"mlp.c_proj.{kind}",),
                "row" if matrix else "replicated",
                matrix,
            ),
        ]
    return tuple(weights)


def _read_llama(settings: dict[str, Any]) -> dict[str, Any]:
    """Llama's fields; other families start from these. Every layer sees everything, whatever `layer_types` says."""
    heads, hidden = settings["num_attention_heads"], settings["hidden_size"]
    head_dim = settings.get("head_dim") or hidden // heads
    layer = LayerAttention(rope=_rope(settings, settings["rope_parameters"]), window=None)
    return {
        "hidden_size": hidden,
        "ffn_size": settings["intermediate_size"],
        "heads": heads,
        "kv_heads": settings.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "norm_eps": settings["rms_norm_eps"],
        "softmax_scale": head_dim**-0.5,
        "max_positions": settings["max_position_embeddings"],
        "layers": (layer,) * settings["num_hidden_layers"],
    }


def _read_windowed(settings: dict[str, Any]) -> dict[str, Any]:
    """Llama's fields with a window and a rotary embedding for each layer, as `layer_types` has it; every layer has the
    window where there are none."""
    count, window, rope = settings["num_hidden_layers"], settings["sliding_window"], settings["rope_parameters"]
    types = settings.get("layer_types") or ["full_attention" if window is None else "sliding_attention"] * count
    if set(types) - {"sliding_attention", "full_attention"} or len(types) != count:
        raise ValueError(
            f"layer_types = {types!r}: {count} layers of sliding_attention or full_attention are supported"
        )
    if window is None and "sliding_attention" in types:
        raise ValueError("layer_types names sliding_attention, and there is no sliding_window")
    layers = {
        kind: LayerAttention(
            rope=_rope(settings, rope.get(kind, rope)), window=window if kind == "sliding_attention" else None
        )
        for kind in set(types)
    }
    first = {**settings, "rope_parameters": rope.get(types[0], rope)}
    return {**_read_llama(first), "layers": tuple(layers[kind] for kind in types)}


def _read_gemma(settings: dict[str, Any]) -> dict[str, Any]:
    """More norms, stored as w - 1; a scaled embedding; Gemma 2 has soft caps, Gemma 3 normed queries and keys."""
    return {
        **_read_windowed(settings),
        "norm_offset": 1.0,
        "post_norms": True,
        "embedding_scale": settings["hidden_size"] ** 0.5,
        "softmax_scale": settings["query_pre_attn_scalar"] ** -0.5,
        "attention_softcap": settings["attn_logit_softcapping"],
        "logit_softcap": settings["final_logit_softcapping"],
    }


def _read_gpt2(settings: dict[str, Any]) -> dict[str, Any]:
    """Learned positions, LayerNorm, biases, no gate."""
    heads, hidden = settings["n_head"], settings["n_embd"]
    return {
        "hidden_size": hidden,
        "ffn_size": settings["n_inner"] or 4 * hidden,
        "heads": heads,
        "kv_heads": heads,
        "head_dim": hidden // heads,
        "gated": False,
        "norm": "LayerNorm",
        "norm_eps": settings["layer_norm_epsilon"],
        "linear_bias": True,
        "softmax_scale": (hidden // heads) ** -0.5,
        "max_positions": settings["n_positions"],
        "learned_positions": True,
        "layers": (LayerAttention(rope=None, window=None),) * settings["n_layer"],
    }


def _rope(settings: dict[str, Any], parameters: dict[str, Any]) -> Rope:
    """A layer's rotary settings, from its part of `rope_parameters`."""
    kind = parameters["rope_type"]
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(f"rope_type = {kind!r}: supported are default, linear, llama3")
    if parameters.get("partial_rotary_factor", settings.get("partial_rotary_factor")) not in (None, 1.0):
        raise ValueError("partial_rotary_factor: only 1.0 is supported")
    theta = float(parameters["rope_theta"])
    if kind == "default":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope(theta=theta, kind=kind, factor=float(parameters["factor"]))
    inside = parameters.get("original_max_position_embeddings", settings["max_position_embeddings"])
    return Rope(
        theta=theta,
        kind=kind,
        factor=float(parameters["factor"]),
        low_freq_factor=float(parameters["low_freq_factor"]),
        high_freq_factor=float(parameters["high_freq_factor"]),
        original_max_positions=int(settings.get("original_max_position_embeddings", inside)),
    )


ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh", "gelu"]] = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_LLAMA = Family(
    weights=_decoder(),
    prefixes=("model.", ""),
    supported={"attention_bias": (False,), "mlp_bias": (False,)},
    read=_read_llama,
)
_MISTRAL = replace(_LLAMA, read=_read_windowed)
_QWEN2 = replace(
    _LLAMA,
    weights=_decoder(qkv_bias=True),
    read=lambda settings: {**_read_windowed(settings), "qkv_bias": True},
)
_QWEN3 = replace(
    _QWEN2,
    weights=_decoder(qk_norm=True),
    read=lambda settings: {**_read_windowed(settings), "qk_norm": True},
)
_GEMMA2 = Family(
    weights=_decoder(post_norms=True),
    prefixes=("model.", ""),
    supported={"attention_bias": (False,), "use_bidirectional_attention": (False,)},
    read=_read_gemma,
    activation_key="hidden_activation",
)
_GEMMA3 = replace(
    _GEMMA2,
    weights=_decoder(qk_norm=True, post_norms=True),
    prefixes=("model.", "language_model.model.", "model.language_model.", ""),
    supported={**_GEMMA2.supported, "attn_logit_softcapping": (), "final_logit_softcapping": ()},
    read=lambda settings: {**_read_gemma(settings), "qk_norm": True},
)
_GPT2 = Family(
    weights=_gpt2(),
    prefixes=("transformer.", ""),
    supported={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    read=_read_gpt2,
    activation_key="activation_function",
)
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "gemma3": _GEMMA3,
    "gpt2": _GPT2,
}
"""Hugging Face `model_type` -> family."""


def family_of(config: dict[str, Any]) -> Family:
    """The family of a config.json, or a ValueError that lists what is supported."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"model_type = {model_type!r}: a teacher must be one of {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def text_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's own settings (in a multimodal checkpoint, its `text_config`), whole, as transformers 5 has
    them."""
    written = config.get("text_config", config)
    # transformers 5 wrote them so, and to import it takes seconds. A rope_scaling that was put in by hand replaces what
    # it wrote.
    if str(config.get("transformers_version")).startswith("5.") and not written.get("rope_scaling"):
        return written
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config)).get_text_config().to_dict()
    except Exception as error:  # its checks raise errors of their own
        raise ValueError(f"config.json: {' '.join(str(error).split())[:200]}") from None


def parse_architecture(config: dict[str, Any]) -> Architecture:
    """Read a config.json, in the form that transformers 5 writes or in an older one."""
    family, settings = family_of(config), text_settings(config)
    given = {**config, **config.get("text_config", {})}
    for key, values in family.supported.items():
        if settings.get(key) not in (*values, None):
            names = " or ".join(map(repr, values or (None,)))
            raise ValueError(f"{key} = {settings[key]!r} of {config['model_type']} is not supported, only {names}")
    activation = settings[family.activation_key]
    if activation not in ACTIVATIONS:
        raise ValueError(f"{family.activation_key} = {activation!r}: supported are {', '.join(ACTIVATIONS)}")
    return Architecture(
        family=config["model_type"],
        vocab_size=settings["vocab_size"],
        activation=ACTIVATIONS[activation],
        tied=given.get("tie_word_embeddings", settings["tie_word_embeddings"]),
        **family.read(settings),
    )
