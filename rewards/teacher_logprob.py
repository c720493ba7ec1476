"""Teacher log-likelihood: the reward of a response is how likely the teacher finds it."""

from __future__ import annotations

import torch

from rewards.base import RewardInput, RewardOutput


def teacher_logprob_rewards(inputs: RewardInput, *, length_alpha: float) -> RewardOutput:
    """r_t = log p_T(y_t | x, y_<t) / T**alpha, so that the rewards of a response sum to its score.

    `length_alpha` 1 gives the mean log-probability of a token (length-normalised), 0 the plain sum, which favours
    short responses.
    """
    length = inputs.lengths_B.clamp(min=1).to(torch.float32) ** length_alpha
    rewards_BR = torch.where(inputs.mask_BR, inputs.teacher_logprobs_BR / length[:, None], 0.0)
    return RewardOutput(rewards_BR=rewards_BR, returns_BR=None, parts={"teacher_logprob": rewards_BR.sum(1)})
