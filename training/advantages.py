"""Advantages as pure functions over S response tokens in batch order (rewards/tokens.py); B = N * G responses."""

from __future__ import annotations

import torch

from configs.schema import GRPOConfig
from rewards.tokens import discounted_sum, following, sum_by_response
from training.experience import Rewarded


def group_scores_advantage(scores_B: torch.Tensor, group_size: int, config: GRPOConfig) -> torch.Tensor:
    """GRPO (arXiv 2402.03300, section 4.1.2) for sequence scores: (R - mean of the group) / (std + epsilon).

    `baseline` `leave_one_out` compares a score with the mean of the other G - 1 (RLOO, arXiv 2402.14740, eq. 6): with
    `scale: none` the only choice that leaves the policy gradient unbiased. It is G / (G - 1) times the centred score.

    `scale`: `group` divides by the group's standard deviation, `none` by nothing (Dr. GRPO, arXiv 2503.20783);
    `batch` is `none` here and divided by the batch's later, because that needs all ranks. A group whose scores are all
    equal gives exactly 0. Returns float32 [B].
    """
    groups_NG = scores_B.view(-1, group_size)
    centred_NG = groups_NG - groups_NG.mean(1, keepdim=True)
    if config.scale == "group":
        centred_NG = centred_NG / (groups_NG.std(1, keepdim=True, correction=1) + config.epsilon)
    if config.baseline == "leave_one_out":
        centred_NG = centred_NG * (group_size / (group_size - 1))
    # The mean of equal numbers may differ from them in the last bit, which a tiny deviation would blow up.
    centred_NG = torch.where((groups_NG == groups_NG[:, :1]).all(1, keepdim=True), 0.0, centred_NG)
    return centred_NG.reshape(-1)


def group_token_advantage(
    returns_S: torch.Tensor, lengths_B: torch.Tensor, group_size: int, config: GRPOConfig
) -> torch.Tensor:
    """GRPO with a reward for each token: returns centred and scaled over all tokens of the group.

    With `baseline` `leave_one_out` a token is compared with the mean over the tokens of the other responses of its
    group. `scale` as in `group_scores_advantage`; a group whose returns are all equal gives exactly 0. Returns float32
    [S].
    """
    counts_N = lengths_B.view(-1, group_size).sum(1)
    sums_N = sum_by_response(returns_S, counts_N)

    def each(values_N: torch.Tensor) -> torch.Tensor:
        return values_N.repeat_interleave(counts_N)

    centred_S = returns_S - each(sums_N / counts_N.clamp(min=1))
    scaled_S = centred_S
    if config.scale == "group":
        variance_N = sum_by_response(centred_S.square(), counts_N) / (counts_N - 1).clamp(min=1)
        scale_S = each(variance_N.sqrt() + config.epsilon)
    else:
        scale_S = torch.ones_like(returns_S)
    if config.baseline == "leave_one_out":
        others_B = sums_N.repeat_interleave(group_size) - sum_by_response(returns_S, lengths_B)
        left_B = (counts_N.repeat_interleave(group_size) - lengths_B).clamp(min=1)
        scaled_S = returns_S - (others_B / left_B).repeat_interleave(lengths_B)
    return torch.where(each(spread(returns_S, counts_N) <= 0), 0.0, scaled_S / scale_S)


def spread(values_S: torch.Tensor, counts_N: torch.Tensor) -> torch.Tensor:
    """[N] largest minus smallest of the values of each group, which has `counts_N` tokens; 0 for an empty one."""
    group_S = torch.repeat_interleave(torch.arange(len(counts_N)), counts_N)
    blank_N = values_S.new_zeros(len(counts_N))
    high_N = blank_N.scatter_reduce(0, group_S, values_S, "amax", include_self=False)
    return high_N - blank_N.scatter_reduce(0, group_S, values_S, "amin", include_self=False)


def has_signal(batch: Rewarded) -> torch.Tensor:
    """bool [N]: the group's responses are not all credited alike. A group without a score has no signal."""
    reward, lengths_B, group_size = batch.reward, batch.rollout.lengths_B, batch.rollout.group_size
    if reward.returns_S is None:
        scores_NG = sum_by_response(reward.rewards_S, lengths_B).view(-1, group_size)
        return scores_NG.amax(1) > scores_NG.amin(1)
    return spread(reward.returns_S, lengths_B.view(-1, group_size).sum(1)) > 0


def gae(
    rewards_S: torch.Tensor, values_S: torch.Tensor, lengths_B: torch.Tensor, *, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16) for responses that end after their last token.

    delta_t = r_t + gamma V_{t+1} - V_t with V = 0 past the end; A_t = sum_k (gamma lam)^k delta_{t+k}.
    Returns (advantages, returns = advantages + values), float32 [S].
    """
    advantages_S = discounted_sum(rewards_S + gamma * following(values_S, lengths_B) - values_S, lengths_B, gamma * lam)
    return advantages_S, advantages_S + values_S


def whiten(values_S: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """Centre and scale. `moments`: of the values of all ranks (`moments_of`, added up)."""
    mean, std = mean_and_std(moments)
    return (values_S - mean) / (std + 1e-8)


def mean_and_std(moments: torch.Tensor) -> tuple[float, float]:
    """Of the values that the moments (`moments_of`, added up) are of."""
    count, total, squares = moments.tolist()
    mean = total / max(count, 1.0)
    return mean, max(squares / max(count, 1.0) - mean * mean, 0.0) ** 0.5


def moments_of(values_S: torch.Tensor) -> torch.Tensor:
    """float64 [3]: count, sum and sum of squares; add them over ranks before they are used."""
    values = values_S.double()
    return torch.stack([torch.tensor(float(len(values)), dtype=torch.float64), values.sum(), values.square().sum()])


def quantile_rewards(scores_B: torch.Tensor, group_size: int) -> torch.Tensor:
    """log of the share of the group whose score is at most the response's own, float32 [B] (BOND).

    With reward log p_<=(y), maximising E[r] - 1/(N - 1) KL(pi || pi_ref) gives the distribution of the best of N
    (arXiv 2407.14622, section 3.2) where no single score has much mass. Its correction for ties, which is between 0
    and log(N) / (N - 1) and constant without them, is left out as in the paper. The share is estimated from the
    group, the response itself included, so it is at least 1 / G.
    """
    groups_NG = scores_B.view(-1, group_size)
    at_most_NG = (groups_NG[:, None, :] <= groups_NG[:, :, None]).sum(-1)
    return torch.log(at_most_NG.to(scores_B.dtype) / group_size).reshape(-1)
