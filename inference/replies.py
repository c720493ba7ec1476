"""What the teacher answers, as the client hands it out: dataclasses of tensors in batch order."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch


@dataclass(frozen=True)
class TeacherInfo:
    """What the teacher says of itself."""

    model: str
    """Name of the model directory."""
    model_dir: str
    """Its path on the server's machine."""
    vocab_size: int
    hidden_size: int
    dtype: str
    """float32 or bfloat16: type of the model and of `hidden`."""
    tensor_parallel: int
    max_positions: int
    """Longest prompt plus response, in tokens."""
    max_request_tokens: int
    """Tokens that one request may carry."""
    max_request_rows: int
    """Responses that one request may carry."""
    eos_ids: tuple[int, ...]
    tokenizer_fingerprint: str
    vocabulary_fingerprint: str
    output_layer: dict[str, Any]
    """As inference/output_layer.py describes it: tensor, file, shape, hash of sampled rows."""

    @staticmethod
    def from_json(value: dict[str, Any]) -> TeacherInfo:
        """From the handshake's JSON."""
        known = {field.name: value[field.name] for field in fields(TeacherInfo)}
        return TeacherInfo(**{**known, "eos_ids": tuple(known["eos_ids"])})

    def same_teacher(self, other: TeacherInfo) -> bool:
        """Whether both would give the same scores: replicas and restarted servers must."""

        def identity(info: TeacherInfo) -> tuple[Any, ...]:
            layer = info.output_layer.get("sha256_of_sampled_rows")
            return info.vocab_size, info.hidden_size, info.dtype, info.vocabulary_fingerprint, layer

        return identity(self) == identity(other)


@dataclass(frozen=True)
class Scored:
    """Values for S response tokens, in batch order (b, then t)."""

    lengths_B: torch.Tensor
    """int64 [B] response lengths; they sum to S."""

    def padded(self, values_S: torch.Tensor, length: int | None = None) -> torch.Tensor:
        """[B, R, ...] from [S, ...], zero beyond each response. R is the longest response unless given."""
        lengths = self.lengths_B
        R = int(lengths.max()) if length is None and len(lengths) else length or 0
        mask_BR = torch.arange(R)[None, :] < lengths[:, None]
        out = values_S.new_zeros(len(lengths), R, *values_S.shape[1:])
        out[mask_BR] = values_S
        return out


@dataclass(frozen=True)
class TeacherScore(Scored):
    """log p(token | prompt, tokens before it)."""

    logprobs_S: torch.Tensor
    """float32 [S] nats."""


@dataclass(frozen=True)
class TeacherTopK(Scored):
    """The K likeliest entries before each response token. The rest of the mass is 1 - sum(exp(logprobs_SK))."""

    logprobs_SK: torch.Tensor
    """float32 [S, K] nats, descending."""
    ids_SK: torch.Tensor
    """int64 [S, K]."""
    logsumexp_S: torch.Tensor
    """float32 [S] logsumexp of all logits divided by the temperature."""


@dataclass(frozen=True)
class TeacherGather(Scored):
    """Log-probabilities at the ids that were asked for."""

    logprobs_SK: torch.Tensor
    """float32 [S, K] nats."""
    logsumexp_S: torch.Tensor
    """float32 [S] logsumexp of all logits divided by the temperature."""


@dataclass(frozen=True)
class TeacherHidden(Scored):
    """States after the final norm that predict each response token: hidden @ output_layer.T are the logits."""

    hidden_SH: torch.Tensor
    """[S, Hidden] in the teacher's dtype."""


@dataclass(frozen=True)
class TeacherAnswers:
    """Generated answers."""

    responses: tuple[tuple[int, ...], ...]
    """Token ids of B = N * samples answers, ordered by prompt; an ending id is included."""


@dataclass(frozen=True)
class TeacherNext:
    """The teacher's distribution of the next token of A responses that still grow."""

    rows_A: torch.Tensor
    """int64 [A] their batch indices, ascending."""
    logprobs_AK: torch.Tensor
    """float32 [A, K] nats of the K likeliest entries, descending; the rest of the mass is 1 - sum(exp(...))."""
    ids_AK: torch.Tensor
    """int64 [A, K]."""
    logsumexp_A: torch.Tensor
    """float32 [A] logsumexp of all logits divided by the temperature."""
    hidden_AH: torch.Tensor
    """[A, Hidden] in the teacher's dtype where K = 0 was asked for; hidden @ output_layer.T are all logits. Otherwise
    [A, 0]."""

    def whole(self, vocab_size: int) -> torch.Tensor:
        """float32 [A, V] log-probabilities in order of ids; minus infinity where only K < V entries were asked for."""
        out = torch.full((len(self.rows_A), vocab_size), -torch.inf)
        return out.scatter_(1, self.ids_AK, self.logprobs_AK)
