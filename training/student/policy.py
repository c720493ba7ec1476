"""The student as one module: a Hugging Face causal language model with grouped attention and chunked logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, unique
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPast

from inference.attention.grouped import AttentionPlan, register_with_transformers
from inference.attention.packed import PackedPlan
from inference.attention.packing import PackedRow
from inference.attention.plain_rows import plain_rows
from training.losses import TokenTerm, without_columns
from training.student.token_logprobs import TERM_ROWS, RowTerm, TokenLogprobs, rows_at_once


@unique
class Way(Enum):
    """How a model is run, the fastest first."""

    PACKED = "packed rows"
    """Grouped attention: a prompt is computed once for all its responses."""
    PLAIN = "plain rows"
    """Each response carries its prompt, through transformers' own attention and cache."""
    UNCACHED = "plain rows without a cache"
    """The same, and each step of sampling computes the whole response again: for caches that are not of one kind."""


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
    the backward pass. `agree` turns this rank's number of tokens into all ranks' (the largest): under ZeRO 3 each call
    of the output layer is a collective, so ranks with unequal numbers of response tokens would wait for each other.
    """

    def __init__(self, model: Any, *, logit_chunk: int = 1024) -> None:
        super().__init__()
        self.model: Any = model
        self.logit_chunk = logit_chunk
        self.agree: Callable[[int], int] = int
        self.unknown_V: torch.Tensor | None = None
        """bool [V] columns that no token has; None: every column has one."""
        self.capturable = True
        """Whether a decoding step may be a CUDA graph; false once that has failed."""
        self._own_attention = model.config._attn_implementation
        self._exchangeable = bool(getattr(model, "_supports_attention_backend", False))
        self.run(Way.PACKED if self._exchangeable else Way.PLAIN)

    @property
    def grouped(self) -> bool:
        return self.way is Way.PACKED

    def run(self, way: Way) -> None:
        """Run the model that way from now on; PACKED only for a model that was made so."""
        self.way = way
        if self._exchangeable:
            self.model.set_attn_implementation(register_with_transformers() if self.grouped else self._own_attention)

    @contextmanager
    def as_transformers(self) -> Iterator[Any]:
        """The model with transformers' own attention, while open."""
        way = self.way
        self.run(Way.PLAIN)
        try:
            yield self.model
        finally:
            self.run(way)

    @property
    def columns(self) -> int:
        """V, those without a token included."""
        return int(self.model.config.get_text_config().vocab_size)

    def limit(self, columns: int) -> None:
        """Give no probability to the columns from `columns` on: a teacher with the same tokenizer has no more."""
        if columns < self.columns:
            device = None if self.unknown_V is None else self.unknown_V.device
            beyond_V = torch.arange(self.columns, device=device) >= columns
            self.unknown_V = beyond_V if self.unknown_V is None else self.unknown_V | beyond_V

    @property
    def config(self) -> Any:
        """The Hugging Face configuration; DeepSpeed looks for it here."""
        return self.model.config

    def hidden(self, tokens_T: torch.Tensor, positions_T: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        """Last hidden states [T, D] of a packed row."""
        out = backbone(self.model)(input_ids=tokens_T[None], position_ids=positions_T[None], plan=plan, use_cache=False)
        return out.last_hidden_state[0]

    def response_states(self, row: PackedRow) -> torch.Tensor:
        """Last hidden states [S, D] that predict each response token."""
        return response_states(backbone(self.model), row, grouped=self.grouped)

    def logits(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        """Vocabulary logits [S, V] in the model's type, as its own class makes them of last hidden states: what it does
        behind the output layer (Gemma 2's cap, Granite's and Cohere's scale) is in them."""
        ids = torch.zeros(1, len(hidden_SD), dtype=torch.int64, device=hidden_SD.device)
        with backbone_gives(self.model, hidden_SD[None]):
            logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits[0]
        if self.unknown_V is not None and self.unknown_V.device != logits.device:
            self.unknown_V = self.unknown_V.to(logits.device)  # once: a copy in each step would wait for the device
        return without_columns(logits, self.unknown_V)

    def forward(
        self, row: PackedRow, *, temperature: float = 1.0, terms: Mapping[str, TokenTerm] | None = None
    ) -> TokenOutputs:
        """Log-probabilities of the row's response tokens at `temperature`, and `terms` of their distributions."""
        terms = terms or {}
        hidden = self.response_states(row)
        most = self.agree(max(len(hidden), 1))  # of all ranks, which make as many calls as the one with most tokens
        count, pieces = math.ceil(most / self.logit_chunk), []
        parts = math.ceil(math.ceil(most / count) / rows_at_once(hidden.device, TERM_ROWS))
        for i in range(count):
            piece = slice(len(hidden) * i // count, len(hidden) * (i + 1) // count)
            arguments = (hidden[piece], row.labels_S[piece], temperature, piece, terms, parts)
            if torch.is_grad_enabled() and count > 1:
                pieces.append(checkpoint(self._chunk, *arguments, use_reentrant=False))
            else:
                pieces.append(self._chunk(*arguments))
        logprobs, entropy, *values = (torch.cat(part) for part in zip(*pieces, strict=True))
        return TokenOutputs(logprobs, entropy, dict(zip(terms, values, strict=True)))

    def _chunk(
        self,
        hidden_SD: torch.Tensor,
        labels_S: torch.Tensor,
        temperature: float,
        piece: slice,
        terms: Mapping[str, TokenTerm],
        parts: int,
    ) -> tuple[torch.Tensor, ...]:
        logits = self.logits(hidden_SD)
        values = [RowTerm.apply(logits, term, piece, parts) for term in terms.values()]
        chosen, entropy = TokenLogprobs.apply(logits, labels_S, temperature)  # last: it overwrites them
        return chosen, entropy, *values


def response_states(trunk: Any, row: PackedRow, *, grouped: bool) -> torch.Tensor:
    """Last hidden states [S, D] of a backbone (`trunk`) that predict each response token of a packed row.

    A model that grouped attention does not reach (`grouped` false) runs each response with a prompt of its own.
    """
    if grouped:
        out = trunk(
            input_ids=row.tokens_T[None], position_ids=row.positions_T[None], plan=PackedPlan(row), use_cache=False
        )
        return out.last_hidden_state[0][row.predict_S]
    plain = plain_rows(row)
    out = trunk(input_ids=plain.tokens_BL, attention_mask=plain.mask_BL, use_cache=False)
    return out.last_hidden_state[plain.sequence_S, plain.place_S]


@contextmanager
def backbone_gives(model: Any, hidden_BTD: torch.Tensor) -> Iterator[None]:
    """While open, the model's backbone gives these last hidden states, whatever it is asked."""
    asked = {
        id(part): part for part in (backbone(model), model.get_decoder()) if part is not model
    }.values()  # OPT's class asks the latter
    for part in asked:
        part.forward = lambda *_, **__: _States(last_hidden_state=hidden_BTD)
    try:
        yield
    finally:
        for part in asked:
            del part.forward  # the class's own again


def backbone(model: Any) -> Any:
    """What a causal language model puts its output layer on."""
    return model.model if model.base_model is model else model.base_model  # Llama 4's text model names it wrong


class _States(BaseModelOutputWithPast):
    """A backbone's output; whatever else a model's class looks for in it is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)
