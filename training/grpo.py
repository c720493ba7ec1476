"""GRPO: the group is the baseline (arXiv 2402.03300). No critic."""

from __future__ import annotations

import torch

from configs.schema import GRPOConfig, RunConfig
from rewards.base import RewardOutput
from rewards.tokens import sum_by_response
from training import distributed
from training.advantages import group_scores_advantage, group_token_advantage, mean_and_std, moments_of
from training.experience import Rewarded


class GRPO:
    """The row `grpo` of training/algorithms.py."""

    needs_critic = False
    compares_groups = True

    def needs_reference(self, config: RunConfig) -> bool:
        """The KL to the reference is in the loss only."""
        return False

    def advantages(
        self, batch: Rewarded, config: RunConfig, kl_coef: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        rollout = batch.rollout
        return grpo_advantages(batch.reward, rollout.lengths_B, rollout.group_size, config.grpo), None

    def after_step(self, metrics: dict[str, float], config: RunConfig, kl_coef: float) -> float:
        """Nothing is steered."""
        return kl_coef


def grpo_advantages(reward: RewardOutput, lengths_B: torch.Tensor, group_size: int, config: GRPOConfig) -> torch.Tensor:
    """Advantages float32 [S]. Collective with `scale: batch`.

    A reward with returns for each token is centred over all tokens of the group; otherwise the sum of a response's
    rewards is its score, and every token of the response gets the score's advantage.
    """
    if reward.returns_S is not None:
        advantages_S = group_token_advantage(reward.returns_S, lengths_B, group_size, config)
    else:
        scores_B = sum_by_response(reward.rewards_S, lengths_B)
        advantages_S = group_scores_advantage(scores_B, group_size, config).repeat_interleave(lengths_B)
    if config.scale == "batch":
        _, std = mean_and_std(distributed.sum_over_ranks(moments_of(advantages_S)))  # centred by group already
        if std > 0.0:  # without any signal all are 0 already
            advantages_S = advantages_S / (std + config.epsilon)
    return advantages_S
