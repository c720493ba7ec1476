"""The algorithms of `--algo`: one file and one row each (docs/extending.md)."""

from __future__ import annotations

from typing import Protocol

import torch

from configs.schema import RunConfig
from training.experience import Rewarded
from training.grpo import GRPO
from training.ppo import PPO
from training.recipes import RECIPES


class Algorithm(Protocol):
    """What the loop asks of an algorithm."""

    needs_critic: bool
    """A value model is trained beside the student."""
    compares_groups: bool
    """It learns from differences within a group, so that a group whose responses are credited alike teaches nothing
    (grpo.no_signal)."""

    def needs_reference(self, config: RunConfig) -> bool:
        """Whether `advantages` reads the reference's log-probabilities."""

    def advantages(
        self, batch: Rewarded, config: RunConfig, kl_coef: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Advantages, and what the critic is trained towards where there is one, float32 [S]. All ranks together."""

    def after_step(self, metrics: dict[str, float], config: RunConfig, kl_coef: float) -> float:
        """The coefficient of the KL penalty for the next step; may add to the step's metrics."""


ALGORITHMS: dict[str, Algorithm] = {"grpo": GRPO(), "ppo": PPO()}


def learns_from_groups(config: RunConfig) -> bool:
    """Whether differences within a group are learnt from: without a policy gradient a group teaches, however it is
    credited."""
    return ALGORITHMS[config.algo].compares_groups and RECIPES[config.recipe].policy_gradient


def has_critic(config: RunConfig) -> bool:
    """Whether a value model is trained: not beside a recipe that makes advantages of its own."""
    return ALGORITHMS[config.algo].needs_critic and RECIPES[config.recipe].advantages is None


def has_reference(config: RunConfig) -> bool:
    """Whether a KL to the reference is in the loss or in the reward."""
    read = config.loss.kl_coef > 0 or ALGORITHMS[config.algo].needs_reference(config)
    return RECIPES[config.recipe].policy_gradient and read
