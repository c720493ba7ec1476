"""What goes into a reward and what comes out. B responses, R tokens in the longest one, right-padded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


def length_mask(lengths_B: torch.Tensor, longest: int) -> torch.Tensor:
    """bool [B, R], true on the first `lengths_B[b]` slots. Masks come from lengths, never from pad ids."""
    return torch.arange(longest, device=lengths_B.device)[None, :] < lengths_B[:, None]


@dataclass(frozen=True)
class RewardInput:
    """One rollout as the rewards see it."""

    lengths_B: torch.Tensor
    """int64 [B] tokens of each response, the end symbol included."""
    finished_B: torch.Tensor
    """bool [B] the response ended with an end symbol; false: cut at the longest allowed length."""
    behavior_logprobs_BR: torch.Tensor
    """float32 [B, R] student's log-probability at sampling time, nats; 0 on padding."""
    teacher_logprobs_BR: torch.Tensor
    """float32 [B, R] teacher's log-probability, nats; 0 on padding. With different tokenizers a token has those of the
    teacher tokens that end in it (rewards/alignment.py): 0 where none does; a response's total is the teacher's."""
    texts: Sequence[str]
    """B response texts without special symbols, stripped."""
    answers: Sequence[Sequence[str]]
    """B lists of accepted answers; empty where the data has none."""

    @property
    def mask_BR(self) -> torch.Tensor:
        """bool [B, R], true on response tokens."""
        return length_mask(self.lengths_B, self.behavior_logprobs_BR.shape[1])


@dataclass(frozen=True)
class RewardOutput:
    """Token rewards, zero outside the mask; sequence-level parts sit on the last token."""

    rewards_BR: torch.Tensor
    """float32 [B, R] weighted sum of the parts. PPO reads these."""
    returns_BR: torch.Tensor | None
    """float32 [B, R] what GRPO credits each token with, or None: the sum of a response's rewards is its score."""
    parts: Mapping[str, torch.Tensor]
    """float32 [B] each part by name, summed over the response (unweighted), for the log."""


def place_on_last_token(values_B: torch.Tensor, lengths_B: torch.Tensor, longest: int) -> torch.Tensor:
    """A sequence-level value [B] as token values [B, R]; an empty response keeps nothing."""
    out_BR = values_B.new_zeros(len(values_B), longest)
    kept = torch.nonzero(lengths_B > 0).squeeze(1)
    out_BR[kept, lengths_B[kept] - 1] = values_B[kept]
    return out_BR
