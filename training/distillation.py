"""What a teacher's distribution says of the policy's, token by token: terms for `Policy.forward`.

Each is built for the S response tokens of one packed row, in the row's order, and called on the policy's logits chunk
by chunk. Every one compares plain softmaxes (temperature 1), because that is the policy that is distilled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from training.losses import at_least_float32, generalized_jsd, reverse_kl, sampled_cross_entropy, tail_reverse_kl


@dataclass(frozen=True)
class WholeDistribution:
    """A frozen model's distribution over the whole vocabulary, as last hidden states and output layer."""

    hidden_SD: torch.Tensor
    """[S, D] last hidden state that predicts each response token."""
    output_VD: torch.Tensor
    """[V, D] output layer; its type is the type of the product."""

    def logits(self, piece: slice) -> torch.Tensor:
        """[C, V] logits of some of the tokens."""
        return self.hidden_SD[piece].to(self.output_VD) @ self.output_VD.T

    def select(self, tokens: Sequence[int]) -> WholeDistribution:
        """That of some of the tokens."""
        return WholeDistribution(self.hidden_SD[list(tokens)], self.output_VD)


def shared_vocabulary(policy_SV: torch.Tensor, other_SV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both logits cut to the entries that both have: one tokenizer may be padded differently (trap 26)."""
    shared = min(policy_SV.shape[-1], other_SV.shape[-1])
    return policy_SV[:, :shared], other_SV[:, :shared]


@dataclass(frozen=True)
class ReverseKL:
    """Exact KL(pi || p) at each state: MiniLLM's single-step part (arXiv 2306.08543, eq. 3), or a full KL penalty."""

    other: WholeDistribution
    """p."""

    def __call__(self, logits_SV: torch.Tensor, piece: slice) -> torch.Tensor:
        """Nats, float32 [C]."""
        return reverse_kl(*shared_vocabulary(logits_SV, self.other.logits(piece)))


@dataclass(frozen=True)
class GeneralizedJSD:
    """GKD's divergence to the teacher (arXiv 2306.13649, eq. 1)."""

    teacher: WholeDistribution
    """p_T."""
    beta: float
    """0: forward KL, 1: reverse KL."""

    def __call__(self, logits_SV: torch.Tensor, piece: slice) -> torch.Tensor:
        """Nats, float32 [C]."""
        return generalized_jsd(*shared_vocabulary(logits_SV, self.teacher.logits(piece)), self.beta)


@dataclass(frozen=True)
class SampledCrossEntropy:
    """Gemma 3's distillation: cross-entropy on teacher tokens sampled at each position."""

    teacher: WholeDistribution
    """p_T."""
    count: int
    """K tokens, drawn without replacement by Gumbel top-k (arXiv 1903.06059); all where the vocabulary has fewer."""
    seed: int
    """Of this row's draws: recomputing a chunk in the backward pass draws the same tokens."""

    def __call__(self, logits_SV: torch.Tensor, piece: slice) -> torch.Tensor:
        """Nats, float32 [C]."""
        policy, teacher = shared_vocabulary(logits_SV, self.teacher.logits(piece))
        logprobs = at_least_float32(teacher).log_softmax(-1)
        generator = torch.Generator(logprobs.device).manual_seed(self.seed + piece.start)
        uniform = torch.rand(logprobs.shape, generator=generator, device=logprobs.device)
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
        ids = (logprobs + gumbel).topk(min(self.count, logprobs.shape[-1]), -1).indices
        return sampled_cross_entropy(policy, ids, logprobs.gather(-1, ids))


@dataclass(frozen=True)
class TailReverseKL:
    """KL(pi || p_T) from K teacher entries and the mass of the rest: for a teacher whose hidden states are not sent."""

    ids_SK: torch.Tensor
    """int64 [S, K] vocabulary entries."""
    logprobs_SK: torch.Tensor
    """float32 [S, K] their teacher log-probabilities."""

    def __call__(self, logits_SV: torch.Tensor, piece: slice) -> torch.Tensor:
        """Nats, float32 [C]: at most the exact KL."""
        return tail_reverse_kl(logits_SV, self.ids_SK[piece], self.logprobs_SK[piece])
