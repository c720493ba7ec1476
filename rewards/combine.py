"""A reward is a weighted sum of named parts: token rewards of each teacher, and parts that look at the response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch

from rewards.base import RewardOutput
from rewards.tokens import place_on_last_token, sum_by_response


@dataclass(frozen=True)
class TeacherReward:
    """The reward by one of several teachers."""

    name: str | None
    """Its parts are named `PART/NAME`; None: PART alone, for the first teacher."""
    weight: float
    """What its reward is multiplied by in the sum; may be negative."""
    reward: RewardOutput


def weighted_sum(teachers: Sequence[TeacherReward]) -> RewardOutput:
    """The teachers' rewards, and returns where all have them, added by weight; parts stay as they are."""
    rewards_S = reduce(torch.add, [t.weight * t.reward.rewards_S for t in teachers])
    returns = [t.weight * t.reward.returns_S for t in teachers if t.reward.returns_S is not None]
    named = {
        part if t.name is None else f"{part}/{t.name}": values_B
        for t in teachers
        for part, values_B in t.reward.parts_B.items()
    }
    return RewardOutput(rewards_S, reduce(torch.add, returns) if len(returns) == len(teachers) else None, named)


def add_parts(
    reward: RewardOutput, parts: Mapping[str, torch.Tensor], weights: Mapping[str, float], lengths_B: torch.Tensor
) -> RewardOutput:
    """The reward with each part's weighted values added: `[S]` token by token, `[B]` on the response's last token.

    Where tokens are credited with returns (`minillm`), every token of the response led to what a part says of the
    whole, so each one's return grows by all of it; it is not divided by the tokens that follow, as the long part is.
    Raises ValueError where a part's name is taken or a value is not finite.
    """
    rewards_S, returns_S, named = reward.rewards_S, reward.returns_S, dict(reward.parts_B)
    for name, values in parts.items():
        if name in named:
            raise ValueError(f"two parts of the reward are called {name!r}")
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"part {name!r} of the reward has a value that is not finite: {values}")
        by_token = len(values) != len(lengths_B)
        values_S = values if by_token else place_on_last_token(values, lengths_B)
        named[name] = sum_by_response(values, lengths_B) if by_token else values
        rewards_S = rewards_S + weights[name] * values_S
        if returns_S is not None:
            whole_S = named[name].repeat_interleave(lengths_B)
            returns_S = returns_S + weights[name] * whole_S
    return RewardOutput(rewards_S, returns_S, named)
