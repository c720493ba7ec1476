"""Tiny random models of every family that the teacher supports, saved as Hugging Face directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB = 101  # prime: never divisible by the ranks
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 70,  # not divisible by 4 ranks: the MLP is padded too
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_GEMMA: dict[str, Any] = {
    **_SIZES,
    "head_dim": 16,
    "sliding_window": 5,
    "query_pre_attn_scalar": 20,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def _llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES))


def _llama3() -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**_SIZES, rope_parameters=_LLAMA3_ROPE, tie_word_embeddings=True)
    )


def _mistral() -> Any:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**_SIZES, sliding_window=5))


def _qwen2() -> Any:
    return transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**_SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    )


def _qwen3() -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_SIZES, head_dim=16))


def _gemma2() -> Any:
    config = transformers.Gemma2Config(
        **_SIZES, head_dim=16, sliding_window=5, query_pre_attn_scalar=20,
        attn_logit_softcapping=5.0, final_logit_softcapping=3.0, attn_implementation="eager",
    )  # fmt: skip
    return transformers.Gemma2ForCausalLM(config)


def _gemma3() -> Any:
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**_GEMMA))


def _gemma3_multimodal() -> Any:
    config = transformers.Gemma3Config(
        text_config=_GEMMA, vision_config=_VISION, mm_tokens_per_image=4, image_token_index=100
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def _gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCAB, n_embd=48, n_head=4, n_layer=3, n_positions=128, bos_token_id=1, eos_token_id=2
        )
    )


BUILDERS = {
    "llama": _llama,
    "llama3": _llama3,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gemma3_multimodal": _gemma3_multimodal,
    "gpt2": _gpt2,
}


def build(kind: str, directory: Path, seed: int = 0) -> Any:
    """A random model in float32, saved in two or more shards, with weights large enough for mistakes to show."""
    torch.manual_seed(seed)
    model = BUILDERS[kind]().eval().float()
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name or name.endswith("bias"):
            centre = 0.0 if name.endswith("bias") or kind.startswith("gemma") else 1.0
            torch.nn.init.normal_(parameter, mean=centre, std=0.2)
        else:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(directory, max_shard_size="100KB")
    return model


def save_tokenizer(directory: Path, first: str = "a") -> None:
    """A tokenizer.json with VOCAB pieces; `first` makes two of them differ."""
    pieces = [first, *(f"p{i}" for i in range(1, VOCAB))]
    model = {"type": "WordLevel", "vocab": {piece: i for i, piece in enumerate(pieces)}, "unk_token": first}
    content = {"version": "1.0", "added_tokens": [], "model": model}
    (directory / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


@torch.no_grad()
def reference_logits(model: Any, prompt: tuple[int, ...], response: tuple[int, ...]) -> torch.Tensor:
    """float32 [R, V] logits that predict each response token, from Hugging Face's own forward pass."""
    ids = torch.tensor([prompt + response])
    return model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float() if response else torch.zeros(0, VOCAB)
