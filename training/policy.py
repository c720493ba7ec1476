"""The student as one module: a Hugging Face causal language model with grouped attention and chunked logits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from inference.attention import AttentionPlan, PackedPlan, register_with_transformers
from inference.packing import PackedRow
from training.losses import reverse_kl

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TokenOutputs:
    """What the policy says of the S response tokens of a packed row."""

    logprobs_S: torch.Tensor
    """float32 [S] log pi(token | before), nats, at the temperature asked for."""
    entropy_S: torch.Tensor
    """float32 [S] entropy of that distribution, nats; no gradient."""
    teacher_kl_S: torch.Tensor | None
    """float32 [S] exact KL(pi || p_T) at the state before the token, or None without a teacher view."""


class Policy(nn.Module):
    """Wraps the model so that one `forward` gives everything a loss needs, and no [T, V] float32 tensor is alive.

    `logit_chunk` tokens have their vocabulary logits alive at a time; with more than one chunk each is recomputed in
    the backward pass.
    """

    def __init__(self, model: Any, *, logit_chunk: int = 1024) -> None:
        super().__init__()
        self.model: Any = model
        self.logit_chunk = logit_chunk

    @property
    def config(self) -> Any:
        """The Hugging Face configuration; DeepSpeed looks for it here."""
        return self.model.config

    def hidden(self, tokens_T: torch.Tensor, positions_T: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        """Last hidden states [T, D] of a packed row."""
        out = self.model.base_model(
            input_ids=tokens_T[None], position_ids=positions_T[None], plan=plan, use_cache=False
        )
        return out.last_hidden_state[0]

    def logits(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        """Vocabulary logits [S, V] in the model's type."""
        return self.model.get_output_embeddings()(hidden_SD)

    def forward(
        self,
        row: PackedRow,
        *,
        temperature: float = 1.0,
        teacher_hidden_SD: torch.Tensor | None = None,
        teacher_output_VD: torch.Tensor | None = None,
    ) -> TokenOutputs:
        """Log-probabilities of the row's response tokens; with a teacher view, the exact KL to it as well.

        The KL compares both models at the sampling temperature's plain softmax (temperature 1), because that is the
        policy that is distilled.
        """
        hidden = self.hidden(row.tokens_T, row.positions_T, PackedPlan(row))[row.predict_S]
        pieces = []
        for start in range(0, max(len(hidden), 1), self.logit_chunk):
            piece = slice(start, start + self.logit_chunk)
            teacher = None if teacher_hidden_SD is None else teacher_hidden_SD[piece]
            arguments = (hidden[piece], row.labels_S[piece], temperature, teacher, teacher_output_VD)
            if torch.is_grad_enabled() and len(hidden) > self.logit_chunk:
                pieces.append(checkpoint(self._chunk, *arguments, use_reentrant=False))
            else:
                pieces.append(self._chunk(*arguments))
        logprobs, entropy, kl = zip(*pieces, strict=True)
        return TokenOutputs(
            logprobs_S=torch.cat(logprobs),
            entropy_S=torch.cat(entropy),
            teacher_kl_S=torch.cat(kl) if teacher_hidden_SD is not None else None,
        )

    def _chunk(
        self,
        hidden_SD: torch.Tensor,
        labels_S: torch.Tensor,
        temperature: float,
        teacher_hidden_SD: torch.Tensor | None,
        teacher_output_VD: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = self.logits(hidden_SD)
        logprobs_SV = (logits.float() / temperature).log_softmax(-1)
        with torch.no_grad():
            entropy = -(logprobs_SV.exp() * logprobs_SV).sum(-1)
        chosen = logprobs_SV.gather(-1, labels_S[:, None])[:, 0]
        if teacher_hidden_SD is None or teacher_output_VD is None:
            return chosen, entropy, torch.empty(0)
        teacher_logits = teacher_hidden_SD.to(teacher_output_VD.dtype) @ teacher_output_VD.T
        # Vocabularies of the same tokenizer may be padded differently (trap 26): compare the entries that both have.
        shared = min(logits.shape[-1], teacher_logits.shape[-1])
        return chosen, entropy, reverse_kl(logits[:, :shared], teacher_logits[:, :shared])


def load_policy(path: str | Path, dtype: str, *, gradient_checkpointing: bool = False) -> Policy:
    """Read a Hugging Face model directory (or hub id) as a policy. Dropout is switched off.

    Raises ValueError for a model that transformers' attention registry does not reach.
    """
    config = AutoConfig.from_pretrained(path)
    for name in ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=DTYPES[dtype])
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(
            f"student.path = {str(path)!r}: {type(model).__name__} does not use transformers' attention registry, "
            "so it cannot share a prompt among responses; use a Llama, Mistral, Gemma or Qwen model"
        )
    model.set_attn_implementation(register_with_transformers())
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Policy(model)
