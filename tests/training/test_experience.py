"""Parts of a batch by its groups: every field of every kind goes by the axis that its name ends with."""

from __future__ import annotations

from dataclasses import replace

import torch

from inference.attention.packing import Group
from rewards.base import RewardOutput
from tests.support.experiences import experience_of, prompts_of, rollout_of
from training.experience import Experience, TeacherView, join, take

RESPONSES = [(10, 11), (12,), (), (13, 14, 15), (16,), (17,)]
"""Of three prompts."""
NUMBERS_S = torch.arange(8.0)


def batch() -> Experience:
    """Each token's numbers are its place in the batch, each response's are its own."""
    whole = experience_of(
        rollout_of(prompts_of([(1,), (2, 3), (4,)]), RESPONSES, NUMBERS_S), NUMBERS_S,
        hidden_SD=NUMBERS_S[:, None] * torch.ones(2), values_S=NUMBERS_S,
    )  # fmt: skip
    other = TeacherView(NUMBERS_S, torch.arange(6), torch.zeros(6, dtype=torch.int64))
    scored = replace(whole.scored, others=(other,))
    reward = RewardOutput(NUMBERS_S, None, {"format": torch.arange(6.0)})
    return replace(whole, rewarded=replace(whole.rewarded, scored=scored, reward=reward))


def check(part: Experience, prompts: list[int], rows: list[int], tokens: list[int]) -> None:
    """That `part` has these, in this order, at every depth."""
    rollout, scored, reward = part.rollout, part.scored, part.rewarded.reward
    assert [prompt.index for prompt in rollout.prompts_N] == prompts
    assert list(rollout.responses_B) == [RESPONSES[b] for b in rows]
    assert reward.parts_B["format"].tolist() == scored.others[0].scored_tokens_B.tolist() == rows
    numbers = (rollout.behavior_logprobs_S, part.advantages_S, scored.values_S, reward.rewards_S)
    for values_S in (*numbers, scored.others[0].logprobs_S, scored.teacher.hidden_SD):
        assert values_S is not None
        assert values_S.view(len(tokens), -1)[:, -1].tolist() == tokens
    assert reward.returns_S is part.value_targets_S is scored.reference_logprobs_S is None
    assert rollout.group_size == 2


def test_groups_are_taken_in_the_order_asked_for_and_put_together() -> None:
    whole = batch()
    check(take(whole, [2, 0]), [2, 0], [4, 5, 0, 1], [6, 7, 0, 1, 2])
    check(take(whole, [1]), [1], [2, 3], [3, 4, 5])
    check(join(take(whole, [1]), take(whole, [2, 0])), [1, 2, 0], [2, 3, 4, 5, 0, 1], [3, 4, 5, 6, 7, 0, 1, 2])
    assert take(whole.rollout, [0, 0]).behavior_logprobs_S.tolist() == [0.0, 1.0, 2.0] * 2


def test_a_rollout_by_its_prompts() -> None:
    rollout = batch().rollout
    assert rollout.groups()[1:] == [Group((2, 3), ((), (13, 14, 15)), 2), Group((4,), ((16,), (17,)), 4)]
    assert [prompt.index for prompt in rollout.prompt_of_response()] == [0, 0, 1, 1, 2, 2]
    turns = ({"role": "user", "content": "Hvat?"},)
    assert replace(rollout.prompts_N[0], text="rendered", turns=turns).asked == turns
