"""PPO: a critic is the baseline (arXiv 1707.06347), and the KL to the reference is a penalty in the reward."""

from __future__ import annotations

import torch

from configs.schema import PPOConfig
from rewards.base import RewardOutput, length_mask
from training import distributed
from training.advantages import gae, masked_sums, whiten


def penalised_rewards(
    rewards_BR: torch.Tensor, behavior_BR: torch.Tensor, reference_BR: torch.Tensor, mask_BR: torch.Tensor, coef: float
) -> torch.Tensor:
    """r_t - coef * (log pi_b - log pi_ref), float32 [B, R] (Ziegler et al., arXiv 1909.08593, eq. 2)."""
    return torch.where(mask_BR, rewards_BR - coef * (behavior_BR - reference_BR), 0.0)


def next_kl_coefficient(coef: float, kl: float, config: PPOConfig, responses: int) -> float:
    """The adaptive controller (arXiv 1909.08593, section 2.2): towards `kl_target` nats a token, by at most 20 % of
    responses / horizon. Fixed where no target is set."""
    if config.kl_target is None:
        return coef
    error = min(max(kl / config.kl_target - 1.0, -0.2), 0.2)
    return coef * (1.0 + error * responses / config.kl_horizon)


def ppo_advantages(
    reward: RewardOutput,
    lengths_B: torch.Tensor,
    behavior_BR: torch.Tensor,
    reference_BR: torch.Tensor | None,
    values_BR: torch.Tensor,
    config: PPOConfig,
    kl_coef: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages, returns for the critic), float32 [B, R], 0 on padding. Collective when whitening."""
    mask_BR = length_mask(lengths_B, reward.rewards_BR.shape[1])
    rewards_BR = reward.rewards_BR
    if reference_BR is not None:
        rewards_BR = penalised_rewards(rewards_BR, behavior_BR, reference_BR, mask_BR, kl_coef)
    advantages_BR, returns_BR = gae(rewards_BR, values_BR, lengths_B, gamma=config.gamma, lam=config.gae_lambda)
    if config.whiten:
        count, total, squares = distributed.sum_over_ranks(masked_sums(advantages_BR, mask_BR)).tolist()
        advantages_BR = whiten(advantages_BR, mask_BR, (count, total, squares))
    return advantages_BR, returns_BR
