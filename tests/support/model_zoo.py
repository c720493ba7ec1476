"""Tiny random students of many families, in transformers' own classes; their sizes are common, a few have more to say.

python -m tests.support.model_zoo        # the table of docs/models.md, written into it
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from inference.attention.packing import groups_of, pack_row
from training.student.loading import load_policy, own_logprobs

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 50
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "head_dim": 8,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "n_shared_experts": 1, "shared_expert_intermediate_size": 24,
}  # fmt: skip
OLD = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "n_inner": 48, "d_model": 32, "n_layers": 3,
       "n_heads": 4, "ffn_dim": 48, "num_layers": 3, "num_heads": 4}  # fmt: skip
WINDOW = {"sliding_window": 4}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
          "first_k_dense_replace": 1, "num_key_value_heads": 4, "n_group": 1, "topk_group": 1}  # fmt: skip
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
         "layer_types": ["linear_attention", "full_attention", "linear_attention"], "num_hidden_layers": 3}  # fmt: skip
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_d_ssm": 64, "mamba_chunk_size": 8,
         "mamba_n_groups": 1, "mamba_expand": 2}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": WINDOW, "ministral": MIXED, "ministral3": {}, "smollm3": {}, "arcee": {}, "helium": {},
    "qwen2": {}, "qwen3": {}, "qwen2_moe": EXPERTS, "qwen3_moe": EXPERTS, "qwen3_next": {**DELTA, **EXPERTS},
    "qwen3_5_text": DELTA, "gemma": {}, "gemma2": {**MIXED, "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0}, "gemma3_text": MIXED, "gemma3": {"text_config": {**SIZES, **MIXED},
    "vision_config": VISION, "mm_tokens_per_image": 4}, "vaultgemma": {**MIXED, "final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 8.0, "residual_multiplier": 0.5, "embedding_multiplier": 4.0,
    "attention_multiplier": 0.3}, "granitemoe": {**EXPERTS, "logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.2}, "cohere2": {**MIXED, "logit_scale": 0.2}, "olmo": {}, "olmo2": {}, "olmo3": MIXED,
    "olmoe": EXPERTS, "phi": {}, "phi3": WINDOW, "phimoe": EXPERTS, "glm": {}, "glm4": {}, "glm4_moe": EXPERTS,
    "mixtral": {**EXPERTS, **WINDOW}, "deepseek_v3": {**EXPERTS, **LATENT, "head_dim": 8}, "gpt_oss": {**EXPERTS,
    **MIXED}, "nanochat": {"final_logit_softcapping": 3.0}, "exaone4": MIXED, "ernie4_5": {}, "hunyuan_v1_dense": {},
    "seed_oss": {}, "apertus": {}, "stablelm": {}, "starcoder2": WINDOW, "nemotron": {}, "persimmon": {},
    "minicpm3": {**LATENT, "num_key_value_heads": 4}, "llama4_text": {**EXPERTS, "intermediate_size_mlp": 48,
    "attention_chunk_size": 4, "layer_types": ["chunked_attention", "full_attention", "chunked_attention"]},
    "falcon_h1": MAMBA, "lfm2": {"layer_types": ["conv", "full_attention", "conv"]}, "bamba": {**MAMBA,
    "attn_layer_indices": [1]}, "gpt2": OLD, "gpt-sw3": OLD, "gpt_neox": {}, "gptj": {**OLD, "rotary_dim": 8},
    "gpt_bigcode": OLD, "gpt_neo": {**OLD, "attention_types": [[["global", "local"], 1]],
    "num_layers": 2, "num_hidden_layers": None,
    "window_size": 4}, "bloom": OLD, "mpt": OLD, "falcon": {**OLD, "head_dim": None}, "opt": {**OLD,
    "word_embed_proj_dim": 32}, "xglm": {**OLD, "attention_heads": 4}, "mamba": {}, "rwkv": {},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 4, "lru_width": 32},
    "bert": {"is_decoder": False},
}  # fmt: skip
PROMPTS = [(3, 4, 5, 6, 7, 8), (7,)]
RESPONSES = [(9, 10, 11, 12, 13, 14), (15,), (16, 17), (5, 6, 7, 8)]


@dataclass(frozen=True)
class Found:
    """What became of one family as a student."""

    way: str
    """How it is run, or the line of its refusal."""
    gap: float | None
    """Largest difference of a log-probability from transformers', nats; None where it is refused."""


def make(family: str) -> Any:
    """A random model in evaluation mode."""
    settings = {**SIZES, **FAMILIES[family]}
    if "text_config" in settings:
        settings = dict(FAMILIES[family])
    config = transformers.AutoConfig.for_model(family, **{k: v for k, v in settings.items() if v is not None})
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def try_student(family: str) -> Found:
    """Load it as a student, and hold responses of unlike lengths, longer than windows, against transformers."""
    with tempfile.TemporaryDirectory() as folder:
        make(family).save_pretrained(folder)
        try:
            policy = load_policy(folder, "float32").eval()
        except ValueError as error:
            return Found(str(error).replace(folder, family), None)
    groups = groups_of(PROMPTS, RESPONSES, 2)
    with torch.no_grad():
        logprobs_S = policy(pack_row(groups)).logprobs_S
    return Found(policy.way.value, float((logprobs_S - own_logprobs(policy, groups)).abs().max()))


def table() -> str:
    """Markdown, a row a family."""
    lines = ["| family | run in | largest difference, nats |", "| --- | --- | ---: |"]
    for family in FAMILIES:
        found = try_student(family)
        way, gap = (found.way, f"{found.gap:.0e}") if found.gap is not None else ("-", "refused")
        lines.append(f"| {family} | {way} | {gap} |")
    return "\n".join(lines)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    page = ROOT / "docs" / "models.md"
    before, rest = page.read_text(encoding="utf-8").split("<!-- students -->\n")
    after = rest.split("<!-- end -->\n", 1)[1]
    page.write_text(f"{before}<!-- students -->\n{table()}\n<!-- end -->\n{after}", encoding="utf-8")
