"""Model families, each one table: from config.json and Hugging Face tensor names to Megatron's parameters and shards.

No torch here: `Architecture` is read from config.json alone, so a wrong setting is found before anything is loaded.
A `Weight` says which Hugging Face tensors make one Megatron parameter and how tensor parallelism cuts it.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    """Everything that Megatron needs to know of a model; numbers as in config.json unless said otherwise."""

    family: str
    vocab_size: int
    hidden_size: int
    ffn_size: int
    heads: int
    kv_heads: int
    head_dim: int
    activation: Literal["silu", "gelu_tanh", "gelu"]
    gated: bool
    """Gate and up projections (SwiGLU, GeGLU)."""
    norm: Literal["RMSNorm", "LayerNorm"]
    norm_eps: float
    norm_offset: float
    """Added to stored norm weights: Gemma stores w where 1 + w is meant."""
    qk_norm: bool
    post_norms: bool
    """Norms after attention and after the MLP, before the residual is added (Gemma 3)."""
    linear_bias: bool
    """All linear layers have a bias (GPT-2)."""
    embedding_scale: float
    softmax_scale: float
    tied: bool
    """The output layer is the embedding."""
    max_positions: int
    learned_positions: bool
    layers: tuple[LayerAttention, ...]
    eos_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Family:
    """The table of one family."""

    defaults: dict[str, Any]
    """transformers' defaults for keys that a published config.json may leave out."""
    prefixes: tuple[str, ...]
    """What may stand before the names of `weights` in a checkpoint; the first that fits is used."""
    weights: tuple[Weight, ...]
    output: tuple[str, ...] = ("lm_head.weight", "language_model.lm_head.weight")
    """Full names that the untied output layer may have."""
    activation_key: str = "hidden_act"
    fixed: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    """Settings that must have one of these values (or be absent): others are not supported."""


_ATTENTION = "decoder.layers.{i}.self_attention."
_MLP = "decoder.layers.{i}.mlp."


def _decoder(*, qk_norm: bool, post_norms: bool) -> tuple[Weight, ...]:
    """The Llama layout, with Gemma 3's and Qwen 3's additions."""
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


_LLAMA_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}
_NO_BIAS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("attention_bias", (False, None)),
    ("mlp_bias", (False, None)),
)
_GEMMA3 = Family(
    # transformers' Gemma3TextConfig; Google's multimodal files name only what differs from it.
    defaults={
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
    },
    prefixes=("model.", "language_model.model.", "model.language_model.", ""),
    weights=_decoder(qk_norm=True, post_norms=True),
    activation_key="hidden_activation",
    fixed=(
        ("attention_bias", (False, None)),
        ("attn_logit_softcapping", (None,)),
        ("final_logit_softcapping", (None,)),
        ("use_bidirectional_attention", (False, None)),
    ),
)
FAMILIES: dict[str, Family] = {
    "llama": Family(
        defaults=_LLAMA_DEFAULTS,
        prefixes=("model.", ""),
        weights=_decoder(qk_norm=False, post_norms=False),
        fixed=_NO_BIAS,
    ),
    "mistral": Family(
        defaults={**_LLAMA_DEFAULTS, "max_position_embeddings": 131_072, "num_key_value_heads": 8},
        prefixes=("model.", ""),
        weights=_decoder(qk_norm=False, post_norms=False),
        fixed=_NO_BIAS,
    ),
    "qwen3": Family(
        defaults={**_LLAMA_DEFAULTS, "max_position_embeddings": 32_768, "head_dim": 128, "num_key_value_heads": 32},
        prefixes=("model.", ""),
        weights=_decoder(qk_norm=True, post_norms=False),
        fixed=_NO_BIAS,
    ),
    "gemma3_text": _GEMMA3,
    "gemma3": _GEMMA3,
    "gpt2": Family(
        defaults={
            "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new",
            "tie_word_embeddings": True,
            "n_positions": 1024,
            "n_inner": None,
        },
        prefixes=("transformer.", ""),
        weights=_gpt2(),
        activation_key="activation_function",
        fixed=(
            ("scale_attn_weights", (True, None)),
            ("scale_attn_by_inverse_layer_idx", (False, None)),
            ("add_cross_attention", (False, None)),
        ),
    ),
}
"""Hugging Face `model_type` -> family."""

ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh", "gelu"]] = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def family_of(config: dict[str, Any]) -> Family:
    """The family of a config.json, or a ValueError that lists what is supported."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"model_type = {model_type!r}: a teacher must be one of {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def parse_architecture(config: dict[str, Any]) -> Architecture:
    """Read a config.json, in the form that transformers 5 writes or in an older one."""
    family = family_of(config)
    settings = {**family.defaults, **_text_settings(config)}
    for key, supported in family.fixed:
        if settings.get(key) not in supported:
            names = " or ".join(repr(value) for value in supported if value is not None) or "None"
            raise ValueError(f"{key} = {settings[key]!r} of {config['model_type']} is not supported, only {names}")
    activation = settings[family.activation_key]
    if activation not in ACTIVATIONS:
        raise ValueError(f"{family.activation_key} = {activation!r}: supported are {', '.join(ACTIVATIONS)}")
    eos = config.get("eos_token_id", settings.get("eos_token_id"))
    eos_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    if config["model_type"] == "gpt2":
        return _gpt2_architecture(settings, ACTIVATIONS[activation], eos_ids)
    heads, hidden = settings["num_attention_heads"], settings["hidden_size"]
    head_dim = settings.get("head_dim") or hidden // heads
    gemma = config["model_type"] in ("gemma3", "gemma3_text")
    return Architecture(
        family=config["model_type"],
        vocab_size=settings["vocab_size"],
        hidden_size=hidden,
        ffn_size=settings["intermediate_size"],
        heads=heads,
        kv_heads=settings.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        activation=ACTIVATIONS[activation],
        gated=True,
        norm="RMSNorm",
        norm_eps=settings["rms_norm_eps"],
        norm_offset=1.0 if gemma else 0.0,
        qk_norm=any("q_norm" in source for weight in family.weights for source in weight.sources),
        post_norms=gemma,
        linear_bias=False,
        embedding_scale=hidden**0.5 if gemma else 1.0,
        softmax_scale=(settings["query_pre_attn_scalar"] if gemma else head_dim) ** -0.5,
        tied=settings["tie_word_embeddings"],
        max_positions=settings["max_position_embeddings"],
        learned_positions=False,
        layers=_layer_attention(settings, gemma),
        eos_ids=eos_ids,
    )


def _text_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's settings: config.json itself, or its `text_config` in a multimodal checkpoint."""
    if "text_config" not in config:
        return config
    text = dict(config["text_config"])
    if "tie_word_embeddings" in config:
        text.setdefault("tie_word_embeddings", config["tie_word_embeddings"])
    return text


def _gpt2_architecture(
    settings: dict[str, Any], activation: Literal["silu", "gelu_tanh", "gelu"], eos_ids: tuple[int, ...]
) -> Architecture:
    heads, hidden = settings["n_head"], settings["n_embd"]
    return Architecture(
        family="gpt2",
        vocab_size=settings["vocab_size"],
        hidden_size=hidden,
        ffn_size=settings["n_inner"] or 4 * hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        activation=activation,
        gated=False,
        norm="LayerNorm",
        norm_eps=settings["layer_norm_epsilon"],
        norm_offset=0.0,
        qk_norm=False,
        post_norms=False,
        linear_bias=True,
        embedding_scale=1.0,
        softmax_scale=(hidden // heads) ** -0.5,
        tied=settings["tie_word_embeddings"],
        max_positions=settings["n_positions"],
        learned_positions=True,
        layers=(LayerAttention(rope=None, window=None),) * settings["n_layer"],
        eos_ids=eos_ids,
    )


def _layer_attention(settings: dict[str, Any], gemma: bool) -> tuple[LayerAttention, ...]:
    """Window and rotary embedding of each layer."""
    count = settings["num_hidden_layers"]
    window = settings.get("sliding_window")
    types = settings.get("layer_types")
    if types is None and gemma:
        pattern = settings["sliding_window_pattern"]
        types = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(count)]
    if types is None:
        # Mistral slides in every layer; Qwen 3 only where use_sliding_window says so (and then names its layers).
        if settings.get("use_sliding_window") is True and window is not None:
            raise ValueError("use_sliding_window = True without layer_types is not supported")
        slides = window is not None and "use_sliding_window" not in settings and settings["model_type"] == "mistral"
        types = ["sliding_attention" if slides else "full_attention"] * count
    unknown = set(types) - {"sliding_attention", "full_attention"}
    if unknown or len(types) != count:
        raise ValueError(
            f"layer_types = {types!r}: {count} layers of sliding_attention or full_attention are supported"
        )
    ropes = {kind: _rope(settings, kind, gemma) for kind in sorted(set(types))}
    return tuple(
        LayerAttention(rope=ropes[kind], window=window if kind == "sliding_attention" else None) for kind in types
    )


def _rope(settings: dict[str, Any], layer_type: str, gemma: bool) -> Rope:
    """Rotary settings of a layer type, from `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling`."""
    parameters = settings.get("rope_parameters")
    if parameters is not None and layer_type in parameters:
        parameters = parameters[layer_type]
    if parameters is None:
        local = gemma and layer_type == "sliding_attention"
        parameters = {} if local else dict(settings.get("rope_scaling") or {})
        parameters["rope_theta"] = settings["rope_local_base_freq" if local else "rope_theta"]
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(f"rope_type = {kind!r}: supported are default, linear, llama3")
    if parameters.get("partial_rotary_factor", settings.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("partial_rotary_factor: only 1.0 is supported")
    return Rope(
        theta=float(parameters.get("rope_theta", settings["rope_theta"])),
        kind=kind,
        factor=float(parameters.get("factor", 1.0)),
        low_freq_factor=float(parameters.get("low_freq_factor", 1.0)),
        high_freq_factor=float(parameters.get("high_freq_factor", 4.0)),
        original_max_positions=int(parameters.get("original_max_position_embeddings", 8192)),
    )
