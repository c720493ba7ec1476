"""What goes into a reward and what comes out. B responses with S tokens in all, laid flat (rewards/tokens.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RewardInput:
    """One rollout as the rewards see it."""

    lengths_B: torch.Tensor
    """int64 tokens of each response, the end symbol included; they sum to S."""
    finished_B: torch.Tensor
    """bool, the response ended with an end symbol; false: cut at the longest allowed length."""
    behavior_logprobs_S: torch.Tensor
    """float32 student's log-probability at sampling time, nats."""
    teacher_logprobs_S: torch.Tensor
    """float32 teacher's log-probability, nats. With different tokenizers a token has those of the teacher tokens that
    end in it (rewards/alignment.py): 0 where none does; a response's total is the teacher's."""
    texts_B: Sequence[str]
    """Response texts without special symbols, stripped."""
    answers_B: Sequence[Sequence[str]]
    """Lists of accepted answers; empty where the data has none."""
    questions_B: Sequence[str] = ()
    """The prompts, rendered."""
    group_size: int = 1
    """G responses to each prompt stand side by side."""


@dataclass(frozen=True)
class RewardOutput:
    """Token rewards; a part that looks at the whole response sits on its last token."""

    rewards_S: torch.Tensor
    """float32 weighted sum of the parts. PPO reads these."""
    returns_S: torch.Tensor | None
    """float32 what a group-relative algorithm credits each token with (MiniLLM's returns), or None: the sum of a
    response's rewards is its score."""
    parts_B: Mapping[str, torch.Tensor]
    """float32 each part by name, summed over the response (unweighted), for the log."""
