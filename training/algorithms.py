"""The algorithms of `--algo`: one file and one row each (docs/extending.md)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch

from configs.checks import require
from configs.schema import RunConfig
from rewards import REWARDS
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
        ...

    def advantages(
        self, batch: Rewarded, config: RunConfig, kl_coef: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Advantages, and what the critic is trained towards where there is one, float32 [S]. All ranks together."""
        ...

    def after_step(self, metrics: dict[str, float], config: RunConfig, kl_coef: float) -> float:
        """The coefficient of the KL penalty for the next step; may add to the step's metrics."""
        ...


ALGORITHMS: dict[str, Algorithm] = {"grpo": GRPO(), "ppo": PPO()}


def check_choices(config: RunConfig) -> None:
    """Algorithm, reward and recipe are rows of their tables, and go together. Raises ValueError with the mend."""
    tables: tuple[tuple[str, str, Iterable[str]], ...] = (
        ("algo", config.algo, ALGORITHMS),
        ("reward", config.reward, REWARDS),
        ("recipe", config.recipe, RECIPES),
    )
    for key, name, table in tables:
        require(name in table, key, name, f"is unknown; use one of {', '.join(table)}")
    algorithm, recipe = ALGORITHMS[config.algo], RECIPES[config.recipe]
    require(
        not algorithm.compares_groups or config.sampling.group_size >= 2,
        "sampling.group_size",
        config.sampling.group_size,
        f"--algo {config.algo} compares responses to the same prompt; use at least 2",
    )
    require(
        not recipe.ranks_groups or algorithm.compares_groups,
        "algo",
        config.algo,
        f"recipe {config.recipe} ranks the responses of a group: use --algo grpo",
    )
    require(
        not recipe.ranks_groups or config.sampling.teacher_mix == 0,
        "sampling.teacher_mix",
        config.sampling.teacher_mix,
        f"recipe {config.recipe} ranks the student's own responses: set it to 0",
    )
    require(
        not config.teachers or recipe.policy_gradient,
        "teachers",
        [teacher.name for teacher in config.teachers],
        f"recipe {config.recipe} has no reward to which other teachers could add: leave them out, or use --recipe rl",
    )
    require(
        config.loss.single_step_entries == 0 or not recipe.always_divergence,
        "loss.single_step_entries",
        config.loss.single_step_entries,
        f"recipe {config.recipe} needs the whole distribution: set it to 0",
    )
