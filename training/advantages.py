"""Advantages as pure functions: tensors and numbers in, values out. Shapes as in DESIGN: B = N*G, R padded."""

from __future__ import annotations

import torch

from rewards.base import length_mask


def group_scores_advantage(
    scores_B: torch.Tensor, group_size: int, *, scale: str, epsilon: float, baseline: str = "mean"
) -> torch.Tensor:
    """GRPO (arXiv 2402.03300, section 4.1.2) for sequence scores: (R - mean of the group) / (std + epsilon).

    `baseline` `leave_one_out` compares a score with the mean of the other G - 1 (RLOO, arXiv 2402.14740, eq. 6): with
    `scale: none` the only choice that leaves the policy gradient unbiased. It is G / (G - 1) times the centred score.

    `scale`: `group` divides by the group's standard deviation, `none` by nothing (Dr. GRPO, arXiv 2503.20783);
    `batch` is `none` here and divided by the batch's later, because that needs all ranks. A group whose scores are all
    equal gives exactly 0. Returns float32 [B].
    """
    groups_NG = scores_B.view(-1, group_size)
    centred_NG = groups_NG - groups_NG.mean(1, keepdim=True)
    if scale == "group":
        centred_NG = centred_NG / (groups_NG.std(1, keepdim=True, correction=1) + epsilon)
    if baseline == "leave_one_out":
        centred_NG = centred_NG * (group_size / (group_size - 1))
    elif baseline != "mean":
        raise ValueError(f"grpo.baseline = {baseline!r}: use mean or leave_one_out")
    # The mean of equal numbers may differ from them in the last bit, which a tiny deviation would blow up.
    centred_NG = torch.where((groups_NG == groups_NG[:, :1]).all(1, keepdim=True), 0.0, centred_NG)
    return centred_NG.reshape(-1)


def group_token_advantage(
    returns_BR: torch.Tensor, lengths_B: torch.Tensor, group_size: int, *, scale: str, epsilon: float,
    baseline: str = "mean",
) -> torch.Tensor:  # fmt: skip
    """GRPO with a reward for each token: returns centred and scaled over all tokens of the group.

    Statistics are over real tokens only. With `baseline` `leave_one_out` a token is compared with the mean over the
    tokens of the other responses of its group. `scale` as in `group_scores_advantage`; a group whose returns are all
    equal gives exactly 0. Returns float32 [B, R], 0 on padding.
    """
    batch, longest = returns_BR.shape
    mask_BR = length_mask(lengths_B, longest)
    mask_NT = mask_BR.view(-1, group_size * longest)
    returns_NT = torch.where(mask_NT, returns_BR.reshape(mask_NT.shape), 0.0)
    count_N = mask_NT.sum(1, keepdim=True).clamp(min=1)
    sum_N = returns_NT.sum(1, keepdim=True)
    centred_NT = torch.where(mask_NT, returns_NT - sum_N / count_N, 0.0)
    if scale == "group":
        std_N = (centred_NT.square().sum(1, keepdim=True) / (count_N - 1).clamp(min=1)).sqrt()
    else:
        std_N, epsilon = torch.ones_like(sum_N), 0.0
    if baseline == "leave_one_out":
        own_B1 = torch.where(mask_BR, returns_BR, 0.0).sum(1, keepdim=True)
        others_B1 = (sum_N - own_B1.view(-1, group_size)).reshape(-1, 1)
        left_B1 = (count_N - lengths_B.view(-1, group_size)).clamp(min=1).reshape(-1, 1)
        centred_NT = torch.where(mask_BR, returns_BR - others_B1 / left_B1, 0.0).view(mask_NT.shape)
    elif baseline != "mean":
        raise ValueError(f"grpo.baseline = {baseline!r}: use mean or leave_one_out")
    highest_N = returns_NT.masked_fill(~mask_NT, -torch.inf).amax(1, keepdim=True)
    lowest_N = returns_NT.masked_fill(~mask_NT, torch.inf).amin(1, keepdim=True)
    centred_NT = torch.where(lowest_N >= highest_N, 0.0, centred_NT / (std_N + epsilon))
    return centred_NT.reshape(batch, longest)


def gae(
    rewards_BR: torch.Tensor, values_BR: torch.Tensor, lengths_B: torch.Tensor, *, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16) for responses that end after their last token.

    delta_t = r_t + gamma V_{t+1} - V_t with V = 0 past the end; A_t = sum_k (gamma lam)^k delta_{t+k}.
    Returns (advantages, returns = advantages + values), float32 [B, R], 0 on padding.
    """
    batch, longest = rewards_BR.shape
    mask_BR = length_mask(lengths_B, longest)
    values = torch.where(mask_BR, values_BR, 0.0)
    following = torch.cat([values[:, 1:], values.new_zeros(batch, 1)], 1)
    delta = torch.where(mask_BR, rewards_BR + gamma * following - values, 0.0)
    running = delta.new_zeros(batch)
    out = []
    for t in range(longest - 1, -1, -1):
        running = delta[:, t] + gamma * lam * running
        out.append(running)
    advantages = torch.stack(out[::-1], 1) if out else delta
    return advantages, torch.where(mask_BR, advantages + values, 0.0)


def whiten(values_BR: torch.Tensor, mask_BR: torch.Tensor, sums: tuple[float, float, float]) -> torch.Tensor:
    """Centre and scale over the mask. `sums`: count, sum and sum of squares over all ranks' masks."""
    count, total, squares = sums
    mean = total / max(count, 1.0)
    variance = max(squares / max(count, 1.0) - mean * mean, 0.0)
    return torch.where(mask_BR, (values_BR - mean) / (variance**0.5 + 1e-8), 0.0)


def masked_sums(values_BR: torch.Tensor, mask_BR: torch.Tensor) -> torch.Tensor:
    """float64 [3]: count, sum and sum of squares over the mask; add them over ranks before `whiten`."""
    kept = values_BR[mask_BR].double()
    return torch.stack([torch.tensor(float(len(kept)), dtype=torch.float64), kept.sum(), kept.square().sum()])


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
