"""Rollouts and experiences made up for tests: what a step would have, without models."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rewards.base import RewardOutput
from training.experience import Experience, Prompt, Rewarded, Rollout, Scored, TeacherView


def prompts_of(tokens_N: Sequence[Sequence[int]]) -> list[Prompt]:
    """Prompts of given tokens; everything else about them is blank."""
    return [Prompt(n, "", tuple(tokens), (), "") for n, tokens in enumerate(tokens_N)]


def rollout_of(
    prompts: Sequence[Prompt], responses: Sequence[Sequence[int]], behavior_logprobs_S: torch.Tensor | None = None
) -> Rollout:
    """All responses finished; G follows from the counts. Log-probabilities are 0 unless given."""
    if behavior_logprobs_S is None:
        behavior_logprobs_S = torch.zeros(sum(map(len, responses)))
    return Rollout(
        prompts_N=list(prompts),
        group_size=len(responses) // max(len(prompts), 1),
        responses_B=[tuple(r) for r in responses],
        finished_B=torch.ones(len(responses), dtype=torch.bool),
        texts_B=[""] * len(responses),
        behavior_logprobs_S=behavior_logprobs_S,
        sampled_logprobs_S=behavior_logprobs_S,
    )


def experience_of(
    rollout: Rollout,
    advantages_S: torch.Tensor,
    value_targets_S: torch.Tensor | None = None,
    *,
    hidden_SD: torch.Tensor | None = None,
    **scored: torch.Tensor | None,
) -> Experience:
    """With zero rewards; `scored` are fields of Scored, `hidden_SD` the teacher's."""
    lengths_B, zeros_S = rollout.lengths_B, torch.zeros_like(rollout.behavior_logprobs_S)
    teacher = TeacherView(zeros_S, lengths_B, torch.zeros_like(lengths_B), hidden_SD=hidden_SD)
    reward = RewardOutput(zeros_S, None, {})
    rewarded = Rewarded(Scored(rollout, teacher, **scored), reward)  # type: ignore[arg-type]
    return Experience(rewarded, advantages_S, value_targets_S)
