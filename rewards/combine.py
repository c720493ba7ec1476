"""A reward is a weighted sum of named parts: the teacher's token rewards, and parts that judge the whole response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rewards.base import RewardInput, RewardOutput, place_on_last_token


@dataclass(frozen=True)
class Part:
    """One judgement of whole responses."""

    name: str
    """`reward/NAME` in the metrics."""
    weight: float
    """What it is multiplied by in the sum; may be negative."""
    values_B: torch.Tensor
    """float32 [B] unweighted."""


@dataclass(frozen=True)
class Opinion:
    """What one of several teachers makes of the responses."""

    name: str | None
    """Its parts are named `PART/NAME`; None: PART alone, for the first teacher."""
    weight: float
    """What its reward is multiplied by in the sum; may be negative."""
    reward: RewardOutput


def weighted_sum(opinions: Sequence[Opinion]) -> RewardOutput:
    """The teachers' rewards, and returns where all have them, added by weight; parts stay as they are."""
    first = opinions[0].reward
    rewards_BR, returns_BR = torch.zeros_like(first.rewards_BR), None
    if first.returns_BR is not None:
        returns_BR = torch.zeros_like(first.returns_BR)
    named = {}
    for opinion in opinions:
        rewards_BR = rewards_BR + opinion.weight * opinion.reward.rewards_BR
        if returns_BR is not None and opinion.reward.returns_BR is not None:
            returns_BR = returns_BR + opinion.weight * opinion.reward.returns_BR
        for part, values_B in opinion.reward.parts.items():
            named[part if opinion.name is None else f"{part}/{opinion.name}"] = values_B
    return RewardOutput(rewards_BR, returns_BR, named)


def add_parts(reward: RewardOutput, inputs: RewardInput, parts: Sequence[Part]) -> RewardOutput:
    """The reward with each part's weighted value on the response's last token.

    Where tokens are credited with returns (`minillm`), every token of the response led to the judgement, so each one's
    return grows by all of it; it is not divided by the tokens that follow, as the long part is.
    Raises ValueError where a part's name is taken or a value is not finite.
    """
    rewards_BR, returns_BR, named = reward.rewards_BR, reward.returns_BR, dict(reward.parts)
    for part in parts:
        if part.name in named:
            raise ValueError(f"two parts of the reward are called {part.name!r}")
        if not bool(torch.isfinite(part.values_B).all()):
            raise ValueError(f"part {part.name!r} of the reward has a value that is not finite: {part.values_B}")
        named[part.name] = part.values_B
        placed_BR = place_on_last_token(part.values_B, inputs.lengths_B, rewards_BR.shape[1])
        rewards_BR = rewards_BR + part.weight * placed_BR
        if returns_BR is not None:
            returns_BR = returns_BR + torch.where(inputs.mask_BR, part.weight * part.values_B[:, None], 0.0)
    return RewardOutput(rewards_BR, returns_BR, named)
