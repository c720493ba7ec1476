"""A response that a teacher has no room for: what is logged and validated is of the others alone."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs.prompts import Format
from configs.schema import RunConfig
from inference.client import TeacherLost
from rewards.base import RewardOutput
from tests.support.experiences import prompts_of, rollout_of
from training import distributed
from training.advantages import has_signal
from training.evaluation import sampled_answers
from training.experience import Prompt, Rewarded, Rollout, Scored, TeacherView
from training.loop import describe

NAN = math.nan


def two_groups() -> Rollout:
    """Two groups of one response, of two tokens and of one."""
    return rollout_of(prompts_of([(1,), (2,)]), [(3, 4), (5,)], torch.tensor([-1.0, -2.0, -3.0]))


def test_means_are_of_the_responses_that_have_a_score() -> None:
    rollout = two_groups()
    teacher = TeacherView(torch.tensor([-4.0, -4.0, NAN]), torch.tensor([2, 0]), torch.tensor([0, 0]))
    reward = RewardOutput(torch.tensor([-3.0, -2.0, NAN]), None, {"minillm": torch.tensor([-5.0, NAN])})
    found = describe(Rewarded(Scored(rollout, teacher), reward), 1)
    assert found["reward/minillm"] == -5.0
    assert found["kl/teacher"] == (3.0 + 2.0) / 2
    assert found["reward/mean"] == -5.0
    assert (found["length/mean"], found["groups/dropped"]) == (1.5, 1)
    assert (found["tokens/sampled"], found["tokens/scored"]) == (3, 2)


@pytest.mark.parametrize("returned", [False, True])
def test_a_group_without_a_score_has_no_signal(returned: bool) -> None:
    """So that grpo.no_signal `resample` answers another prompt in its place."""
    rollout = rollout_of(prompts_of([(1,), (2,), (3,)]), [(4,), (5,), (4,), (5,), (4,), (5,)])
    rewards_S = torch.tensor([-3.0, NAN, -2.0, -1.0, -1.0, -1.0])
    teacher = TeacherView(rewards_S, rollout.lengths_B, torch.zeros(6, dtype=torch.int64))
    reward = RewardOutput(rewards_S, rewards_S if returned else None, {})
    assert has_signal(Rewarded(Scored(rollout, teacher), reward)).tolist() == [False, True, False]


@pytest.mark.parametrize(("teacher_S", "kl"), [([-4.0, -4.0, -4.0], 2.0), ([-4.0, -4.0, NAN], 2.5), ([NAN] * 3, NAN)])
def test_the_reverse_kl_is_of_the_responses_that_have_a_score(teacher_S: list[float], kl: float) -> None:
    rollout = two_groups()

    class Student:
        asked = Format(None)

        def sample(self, prompts: list[Prompt], **_: Any) -> Rollout:
            return replace(rollout, texts_B=["<think>Hm.</think> a", "b"])

    class Link:
        facts = SimpleNamespace(same_tokenizer=False)

        def ask(self, rollout: Rollout, **_: Any) -> Any:
            return lambda: TeacherView(torch.tensor(teacher_S), torch.tensor([2, 1]), torch.tensor([0, 0]))

    found, texts = sampled_answers(Student(), Link(), rollout.prompts_N, RunConfig())  # type: ignore[arg-type]
    assert found == pytest.approx(kl, nan_ok=True)
    assert texts == ["a", "b"]


def test_every_rank_leaves_a_validation_whose_teacher_one_of_them_has_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others would wait for it in the next collective, with NCCL until the watchdog ends them."""
    rollout = two_groups()
    student: Any = SimpleNamespace(sample=lambda prompts, **_: replace(rollout, texts_B=["a", "b"]))
    view = TeacherView(torch.tensor([-4.0, -4.0, -4.0]), torch.tensor([2, 1]), torch.tensor([0, 0]))
    link: Any = SimpleNamespace(facts=SimpleNamespace(same_tokenizer=False), ask=lambda *_, **__: lambda: view)
    monkeypatch.setattr(distributed, "any_rank", lambda flag: True)
    monkeypatch.setattr(distributed, "gather_strings", lambda texts: ["", "no teacher for 6 s"])
    with pytest.raises(TeacherLost, match="no teacher for 6 s"):
        sampled_answers(student, link, rollout.prompts_N, RunConfig())
