"""The student as one module: a Hugging Face causal language model with grouped attention and chunked logits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from configs.schema import AdapterConfig
from inference.attention import AttentionPlan, PackedPlan, register_with_transformers
from inference.packing import PackedRow, plain_rows
from training.adapters import add_adapter, is_adapter, merged_model, quantization
from training.token_logprobs import TokenLogprobs

log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


TokenTerm = Callable[[torch.Tensor, slice], torch.Tensor]
"""From the policy's vocabulary logits [C, V] (the model's type, temperature 1) at some of a row's S response tokens,
and the slice of S that they are, to one number for each, float32 [C]. training/distillation.py has them."""


@dataclass(frozen=True)
class TokenOutputs:
    """What the policy says of the S response tokens of a packed row."""

    logprobs_S: torch.Tensor
    """float32 [S] log pi(token | before), nats, at the temperature asked for."""
    entropy_S: torch.Tensor
    """float32 [S] entropy of that distribution, nats; no gradient."""
    terms: Mapping[str, torch.Tensor]
    """float32 [S] what each `TokenTerm` asked for says of the state before the token."""


class Policy(nn.Module):
    """Wraps the model so that one `forward` gives everything a loss needs, and no [T, V] float32 tensor is alive.

    `logit_chunk` tokens have their vocabulary logits alive at a time; with more than one chunk each is recomputed in
    the backward pass. `agree` turns this rank's number of chunks into all ranks' (the largest): under ZeRO 3 each call
    of the output layer is a collective, so ranks with unequal numbers of response tokens would wait for each other.
    """

    def __init__(self, model: Any, *, logit_chunk: int = 1024) -> None:
        super().__init__()
        self.model: Any = model
        self.logit_chunk = logit_chunk
        self.agree: Callable[[int], int] = int
        self.grouped = getattr(model, "_supports_attention_backend", False)

    def use_plain_rows(self) -> None:
        """Leave grouped attention for transformers' own: every response carries its prompt from now on."""
        self.grouped = False
        if getattr(self.model, "_supports_attention_backend", False):
            self.model.set_attn_implementation("sdpa")

    def generate(self, *arguments: Any, **options: Any) -> torch.Tensor:
        """transformers' own `generate`, with its own attention: what DeepSpeed's rollout engine calls."""
        implementation = self.model.config._attn_implementation
        if self.grouped:
            self.model.set_attn_implementation("sdpa")
        try:
            return self.model.generate(*arguments, **options)
        finally:
            if self.grouped:
                self.model.set_attn_implementation(implementation)

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

    def response_states(self, row: PackedRow) -> torch.Tensor:
        """Last hidden states [S, D] that predict each response token."""
        return response_states(self.model.base_model, row, grouped=self.grouped)

    def logits(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        """Vocabulary logits [S, V] in the model's type."""
        return self.model.get_output_embeddings()(hidden_SD)

    def forward(
        self, row: PackedRow, *, temperature: float = 1.0, terms: Mapping[str, TokenTerm] | None = None
    ) -> TokenOutputs:
        """Log-probabilities of the row's response tokens at `temperature`, and `terms` of their distributions."""
        terms = terms or {}
        hidden = self.response_states(row)
        count, pieces = self.agree(-(-max(len(hidden), 1) // self.logit_chunk)), []
        for i in range(count):
            piece = slice(len(hidden) * i // count, len(hidden) * (i + 1) // count)
            arguments = (hidden[piece], row.labels_S[piece], temperature, piece, terms)
            if torch.is_grad_enabled() and count > 1:
                pieces.append(checkpoint(self._chunk, *arguments, use_reentrant=False))
            else:
                pieces.append(self._chunk(*arguments))
        logprobs, entropy, *values = (torch.cat(part) for part in zip(*pieces, strict=True))
        return TokenOutputs(logprobs, entropy, dict(zip(terms, values, strict=True)))

    def _chunk(
        self, hidden_SD: torch.Tensor, labels_S: torch.Tensor, temperature: float, piece: slice,
        terms: Mapping[str, TokenTerm],
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        logits = self.logits(hidden_SD)
        chosen, entropy = TokenLogprobs.apply(logits, labels_S, temperature, not terms)
        return chosen, entropy, *(term(logits, piece) for term in terms.values())


def response_states(backbone: Any, row: PackedRow, *, grouped: bool) -> torch.Tensor:
    """Last hidden states [S, D] of a backbone that predict each response token of a packed row.

    A model that grouped attention does not reach (`grouped` false) runs each response with a prompt of its own.
    """
    if grouped:
        out = backbone(
            input_ids=row.tokens_T[None], position_ids=row.positions_T[None], plan=PackedPlan(row), use_cache=False
        )
        return out.last_hidden_state[0][row.predict_S]
    plain = plain_rows(row)
    out = backbone(input_ids=plain.tokens_BL, attention_mask=plain.mask_BL, use_cache=False)
    return out.last_hidden_state[plain.sequence_S, plain.place_S]


def load_policy(
    path: str | Path, dtype: str, *, gradient_checkpointing: bool = False, adapter: AdapterConfig | None = None
) -> Policy:
    """Read a Hugging Face model directory (or hub id) as a policy. Dropout is switched off.

    `adapter` of rank above 0: only that is trained. An adapter's directory gives its model with the adapter merged.
    A model that transformers' attention registry does not reach (BLOOM's alibi) runs in plain rows; the log says so.
    """
    options: dict[str, Any] = {"dtype": DTYPES[dtype]}
    if adapter is not None and adapter.four_bit:
        options["quantization_config"] = quantization(DTYPES[dtype])
    if is_adapter(path):
        if "quantization_config" in options:
            raise ValueError(
                f"student.adapter.four_bit = True: {str(path)!r} is an adapter itself; merge it into its model first"
            )
        model = merged_model(path, DTYPES[dtype])
    else:
        model = AutoModelForCausalLM.from_pretrained(path, config=_without_dropout(path), **options)
    policy = Policy(model)
    if policy.grouped:
        model.set_attn_implementation(register_with_transformers())
    else:
        log.warning(
            "student.path = %r: grouped attention does not reach %s, so every response carries its prompt (plain rows)",
            str(path), type(model).__name__,
        )  # fmt: skip
    if adapter is not None and adapter.rank > 0:
        add_adapter(model, adapter)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return policy


def _without_dropout(path: str | Path) -> Any:
    """The model's configuration with every dropout at 0 (trap 19)."""
    config = AutoConfig.from_pretrained(path)
    for name in ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return config
