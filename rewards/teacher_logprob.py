"""Teacher log-likelihood: the reward of a response is how likely the teacher finds it."""

from __future__ import annotations

from rewards.base import RewardInput, RewardOutput
from rewards.tokens import place_in_response, sum_before, sum_by_response


def teacher_logprob_rewards(inputs: RewardInput, *, length_alpha: float) -> RewardOutput:
    """The score of a response is S_T / T**alpha, where S_t sums log p_T(y_k | x, y_<k) over its first t tokens.

    Token t gets what it adds to the score so far: r_t = S_t / t**alpha - S_{t-1} / (t-1)**alpha. So the rewards of a
    response sum to its score, and none of them depends on a later token: with log p_T(y_t) / T**alpha a later choice,
    which sets T, would change the rewards before it, and returns-to-go (PPO) would miss that.
    `length_alpha` 1 gives the mean log-probability of a token (length-normalised), 0 the plain sum, which favours
    short responses.
    """
    logprobs_S, lengths_B = inputs.teacher_logprobs_S, inputs.lengths_B
    t_S = place_in_response(lengths_B)
    share_S = (t_S + 1).to(logprobs_S.dtype) ** -length_alpha
    fade_S = t_S.clamp(min=1).to(logprobs_S.dtype) ** -length_alpha - share_S  # of the sum so far, which begins with 0
    rewards_S = logprobs_S * share_S - sum_before(logprobs_S, lengths_B) * fade_S
    return RewardOutput(rewards_S, None, {"teacher_logprob": sum_by_response(rewards_S, lengths_B)})
