"""What a teacher's distribution says of the policy's, token by token: terms for `Policy.forward`.

Each is built for the S response tokens of one packed row, in the row's order, and called on the policy's logits chunk
by chunk. Every one compares plain softmaxes (temperature 1), because that is the policy that is distilled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from training.losses import reverse_kl


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
