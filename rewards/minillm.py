"""The MiniLLM reward (Gu et al., arXiv 2306.08543): policy gradient of the reverse KL KL(pi_theta || p_T).

r_t = log p_T(y_t|.) - log pi_b(y_t|.). The gradient splits (eq. 3) into a single-step part, the exact KL over the
vocabulary at each state, differentiated directly (training/losses.py), and a long part: log pi(y_t) credited with the
rewards that follow. The long part is length-normalised (section 2.2) so that short responses are not favoured.
"""

from __future__ import annotations

import torch

from rewards.base import RewardInput, RewardOutput, length_mask


def mean_return(
    rewards_BR: torch.Tensor, lengths_B: torch.Tensor, *, gamma: float, normalize: bool, first: int
) -> torch.Tensor:
    """Discounted sum of rewards from t + `first` to the end, divided by the same sum of ones if `normalize`.

    out[b, t] = sum_{k >= t + first} gamma**(k - t - first) r_k / sum_{k >= t + first} gamma**(k - t - first), over the
    tokens of response b; 0 where nothing follows. Powers are relative to t, so long responses do not underflow, and
    numerator and denominator are discounted alike. `first` = 1 is MiniLLM's long part, 0 includes the token itself.
    """
    longest = rewards_BR.shape[1]
    mask_BR = length_mask(lengths_B, longest)
    masked = torch.where(mask_BR, rewards_BR, 0.0)
    total = masked.new_zeros(len(masked))
    weight = masked.new_zeros(len(masked))
    sums, weights = [], []
    for t in range(longest - 1, -1, -1):
        total = masked[:, t] + gamma * total
        weight = mask_BR[:, t].to(masked.dtype) + gamma * weight
        sums.append(total)
        weights.append(weight)
    sums_BR = torch.stack(sums[::-1], 1) if sums else masked
    weights_BR = torch.stack(weights[::-1], 1) if weights else masked
    if first == 1:
        zero = masked.new_zeros(len(masked), 1)
        sums_BR = torch.cat([sums_BR, zero], 1)[:, 1:]
        weights_BR = torch.cat([weights_BR, zero], 1)[:, 1:]
    out = sums_BR / weights_BR.clamp(min=torch.finfo(masked.dtype).tiny) if normalize else sums_BR
    return torch.where(mask_BR & (weights_BR > 0), out, 0.0)


def minillm_rewards(inputs: RewardInput, *, gamma: float, length_normalize: bool, single_step: bool) -> RewardOutput:
    """Rewards for PPO and credited returns for GRPO.

    With `single_step` the immediate reward is left to the exact term in the loss: a token is credited with the
    rewards after it only, so r_t is not counted twice. Without it, a token's own reward is part of its credit.
    """
    mask_BR = inputs.mask_BR
    reward_BR = torch.where(mask_BR, inputs.teacher_logprobs_BR - inputs.behavior_logprobs_BR, 0.0)
    returns_BR = mean_return(
        reward_BR, inputs.lengths_B, gamma=gamma, normalize=length_normalize, first=1 if single_step else 0
    )
    credited_BR = reward_BR
    if single_step:
        # Token t takes r_{t+1}: an advantage estimator that sums from t then sums what follows t.
        following = torch.cat([reward_BR[:, 1:], reward_BR.new_zeros(len(reward_BR), 1)], 1)
        credited_BR = torch.where(mask_BR, gamma * following, 0.0)
    return RewardOutput(rewards_BR=credited_BR, returns_BR=returns_BR, parts={"minillm": reward_BR.sum(1)})
