"""Tiny random students of each family, and a plain Hugging Face computation to hold ours against."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB = 50
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, Any] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**_SIZES, sliding_window=4)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            **_SIZES, head_dim=16, sliding_window=4, query_pre_attn_scalar=20,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            **_SIZES, head_dim=16, sliding_window=4, query_pre_attn_scalar=20, attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_SIZES, head_dim=8)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3, bos_token_id=1,
            eos_token_id=2, pad_token_id=0,
        )
    ),
}  # fmt: skip


def build(family: str, seed: int = 0) -> Any:
    """A random model in evaluation mode, with transformers' own attention."""
    torch.manual_seed(seed)
    return FAMILIES[family]().eval()


def save(family: str, directory: Path, seed: int = 0) -> Path:
    """The same model as a Hugging Face directory."""
    build(family, seed).save_pretrained(directory)
    return directory


def plain_logprobs(
    model: Any, prompt: Sequence[int], response: Sequence[int], temperature: float = 1.0
) -> torch.Tensor:
    """[R] log-probabilities of a response by one unpadded row of its own: nothing of ours takes part."""
    logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
