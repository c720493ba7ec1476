"""PPO: a critic is the baseline (arXiv 1707.06347), and the KL to the reference is a penalty in the reward."""

from __future__ import annotations

import math

import torch

from configs.schema import PPOConfig, RunConfig
from training import distributed
from training.advantages import gae, moments_of, whiten
from training.experience import Rewarded

KL_HORIZON = 1000
"""Responses over which the adaptive controller reacts."""
KL_RANGE = 1000.0
"""How far it may go, either way, from where it began."""


class PPO:
    """The row `ppo` of training/algorithms.py."""

    needs_critic = True
    compares_groups = False

    def needs_reference(self, config: RunConfig) -> bool:
        """For the penalty in the reward."""
        return config.ppo.kl_penalty > 0

    def advantages(
        self, batch: Rewarded, config: RunConfig, kl_coef: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Algorithm.advantages`. Collective when whitening."""
        scored, rollout, ppo = batch.scored, batch.rollout, config.ppo
        rewards_S = batch.reward.rewards_S
        if scored.reference_logprobs_S is not None:
            rewards_S = penalised_rewards(rewards_S, rollout.behavior_logprobs_S, scored.reference_logprobs_S, kl_coef)
        assert scored.values_S is not None
        advantages_S, returns_S = gae(
            rewards_S, scored.values_S, rollout.lengths_B, gamma=ppo.gamma, lam=ppo.gae_lambda
        )
        if ppo.whiten:
            advantages_S = whiten(advantages_S, distributed.sum_over_ranks(moments_of(advantages_S)))
        return advantages_S, returns_S

    def after_step(self, metrics: dict[str, float], config: RunConfig, kl_coef: float) -> float:
        """The adaptive controller; also logs the coefficient that was in force."""
        if "kl/reference" not in metrics:
            return kl_coef
        metrics["ppo/kl_coef"] = kl_coef
        responses = config.prompts_per_step * config.sampling.group_size
        return next_kl_coefficient(kl_coef, metrics["kl/reference"], config.ppo, responses)


def penalised_rewards(
    rewards_S: torch.Tensor, behavior_S: torch.Tensor, reference_S: torch.Tensor, coef: float
) -> torch.Tensor:
    """r_t - coef * (log pi_b - log pi_ref), float32 [S] (Ziegler et al., arXiv 1909.08593, eq. 2)."""
    return rewards_S - coef * (behavior_S - reference_S)


def next_kl_coefficient(coef: float, kl: float, config: PPOConfig, responses: int) -> float:
    """The adaptive controller (arXiv 1909.08593, section 2.2): towards `kl_target` nats a token, by at most 20 % of
    responses / horizon, or of 1 where a step has more. It stays within KL_RANGE times `kl_penalty`: thousands of steps
    on one side of the target would leave it at 0 or at infinity for good. Fixed where no target is set; a step whose
    KL is not a number leaves it as it was."""
    if config.kl_target is None or math.isnan(kl):
        return coef
    error = min(max(kl / config.kl_target - 1.0, -0.2), 0.2)
    wanted = coef * (1.0 + error * min(responses / KL_HORIZON, 1.0))
    return min(max(wanted, config.kl_penalty / KL_RANGE), config.kl_penalty * KL_RANGE)
