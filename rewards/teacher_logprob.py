"""Teacher log-likelihood: the reward of a response is how likely the teacher finds it."""

from __future__ import annotations

import torch

from rewards.base import RewardInput, RewardOutput


def teacher_logprob_rewards(inputs: RewardInput, *, length_alpha: float) -> RewardOutput:
    """The score of a response is S_T / T**alpha, where S_t sums log p_T(y_k | x, y_<k) over its first t tokens.

    Token t gets what it adds to the score so far: r_t = S_t / t**alpha - S_{t-1} / (t-1)**alpha. So the rewards of a
    response sum to its score, and none of them depends on a later token: with log p_T(y_t) / T**alpha a later choice,
    which sets T, would change the rewards before it, and returns-to-go (PPO) would miss that.
    `length_alpha` 1 gives the mean log-probability of a token (length-normalised), 0 the plain sum, which favours
    short responses.
    """
    logprobs_BR = torch.where(inputs.mask_BR, inputs.teacher_logprobs_BR, 0.0)
    share_R = torch.arange(1, logprobs_BR.shape[1] + 1, dtype=logprobs_BR.dtype) ** -length_alpha
    fade_R = torch.cat([share_R.new_zeros(1), share_R])[: len(share_R)] - share_R  # of the sum so far
    before_BR = logprobs_BR.cumsum(1) - logprobs_BR
    rewards_BR = torch.where(inputs.mask_BR, logprobs_BR * share_R - before_BR * fade_R, 0.0)
    return RewardOutput(rewards_BR=rewards_BR, returns_BR=None, parts={"teacher_logprob": rewards_BR.sum(1)})
