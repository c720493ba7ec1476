"""The algorithms of `--algo`: one file and one row each (docs/extending.md)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Protocol

import torch

from configs.checks import check_rules, require
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
    tables: dict[str, Collection[str]] = {"algo": ALGORITHMS, "reward": REWARDS, "recipe": RECIPES}
    for key, table in tables.items():
        name = getattr(config, key)
        require(name in table, key, name, f"is unknown; use one of {', '.join(table)}")
    check_rules(config, _rules(config))
    names, mend = [teacher.name for teacher in config.teachers], "leave them out, or use --recipe rl"
    mend = f"recipe {config.recipe} has no reward to which other teachers could add: {mend}"
    require(not names or RECIPES[config.recipe].policy_gradient, "teachers", names, mend)


def _rules(config: RunConfig) -> Iterator[tuple[str, bool, str]]:
    """What goes together (configs/checks.py)."""
    algorithm, recipe, named = ALGORITHMS[config.algo], RECIPES[config.recipe], f"recipe {config.recipe}"
    mend = f"--algo {config.algo} compares responses to the same prompt; use at least 2"
    yield "sampling.group_size", not algorithm.compares_groups or config.sampling.group_size >= 2, mend
    mend = f"{named} ranks the responses of a group: use --algo grpo"
    yield "algo", not recipe.ranks_groups or algorithm.compares_groups, mend
    mend = f"{named} ranks the student's own responses: set it to 0"
    yield "sampling.teacher_mix", not recipe.ranks_groups or config.sampling.teacher_mix == 0, mend
    mend = f"{named} needs the whole distribution: set it to 0"
    yield "loss.single_step_entries", not recipe.always_divergence or config.loss.single_step_entries == 0, mend
