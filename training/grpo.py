"""GRPO: the group is the baseline (arXiv 2402.03300). No critic."""

from __future__ import annotations

import torch

from configs.schema import GRPOConfig
from rewards.base import RewardOutput, length_mask
from training import distributed
from training.advantages import group_scores_advantage, group_token_advantage, masked_sums


def grpo_advantages(reward: RewardOutput, lengths_B: torch.Tensor, group_size: int, config: GRPOConfig) -> torch.Tensor:
    """Advantages float32 [B, R], 0 on padding. Collective with `scale: batch`.

    A reward with returns for each token is centred over all tokens of the group; otherwise the sum of a response's
    rewards is its score, and every token of the response gets the score's advantage.
    """
    mask_BR = length_mask(lengths_B, reward.rewards_BR.shape[1])
    if reward.returns_BR is not None:
        advantages_BR = group_token_advantage(
            reward.returns_BR, lengths_B, group_size, scale=config.scale, epsilon=config.epsilon,
            baseline=config.baseline,
        )  # fmt: skip
    else:
        scores_B = reward.rewards_BR.sum(1)
        advantage_B = group_scores_advantage(
            scores_B, group_size, scale=config.scale, epsilon=config.epsilon, baseline=config.baseline
        )
        advantages_BR = torch.where(mask_BR, advantage_B[:, None], 0.0)
    if config.scale == "batch":
        count, total, squares = distributed.sum_over_ranks(masked_sums(advantages_BR, mask_BR)).tolist()
        # Centred by group already; only the scale is the batch's.
        std = max(squares / max(count, 1.0) - (total / max(count, 1.0)) ** 2, 0.0) ** 0.5
        if std > 0.0:  # without any signal all are 0 already
            advantages_BR = advantages_BR / (std + config.epsilon)
    return advantages_BR
