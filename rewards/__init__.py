"""From what was sampled and scored to rewards: pure functions of flat tensors (rewards/tokens.py).

`REWARDS` has a row for each `--reward`; parts that are added to it are in rewards/parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rewards.base import RewardInput, RewardOutput
from rewards.minillm import minillm_rewards
from rewards.teacher_logprob import teacher_logprob_rewards


@dataclass(frozen=True)
class TeacherRewardKind:
    """What a teacher's log-probabilities make of a rollout."""

    reward: Callable[[RewardInput, Any, bool], RewardOutput]
    """From the rollout, the settings (`rewards` of the configuration) and whether the exact single-step KL is in the
    loss."""
    raw_text: float = 0.0
    """Weight of the language-model loss on raw text unless loss.pt_coef says otherwise."""
    settings: tuple[str, ...] = ()
    """What it reads of them."""
    single_step: bool = False
    """The single-step KL is in the loss unless loss.single_step_coef says otherwise (one tokenizer)."""


REWARDS: dict[str, TeacherRewardKind] = {
    "teacher_logprob": TeacherRewardKind(
        lambda inputs, settings, single_step: teacher_logprob_rewards(inputs, length_alpha=settings.length_alpha),
        settings=("length_alpha",),
    ),
    "minillm": TeacherRewardKind(
        lambda inputs, settings, single_step: minillm_rewards(
            inputs, gamma=settings.gamma, length_normalize=settings.length_normalize, single_step=single_step
        ),
        settings=("gamma", "length_normalize"),
        raw_text=0.1,
        single_step=True,
    ),
}
