"""Rewards against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from rewards.base import RewardInput
from rewards.lpt_reward import lpt_loss
from rewards.minillm import mean_return, minillm_rewards
from rewards.teacher_logprob import teacher_logprob_rewards
from rewards.tokens import (
    following,
    from_grid,
    place_in_response,
    place_on_last_token,
    response_of_token,
    sum_before,
    sum_by_response,
    to_grid,
)


def rollout() -> RewardInput:
    """Responses of three, one and no tokens."""
    return RewardInput(
        lengths_B=torch.tensor([3, 1, 0]),
        finished_B=torch.tensor([True, True, False]),
        behavior_logprobs_S=torch.tensor([-1.0, -2.0, -3.0, -0.5]),
        teacher_logprobs_S=torch.tensor([-0.5, -1.0, -6.0, -0.25]),
        texts_B=["a", "b", ""],
        answers_B=[(), (), ()],
    )


def test_a_tokens_place_comes_from_lengths() -> None:
    lengths_B, values_S = torch.tensor([2, 0, 3]), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert response_of_token(lengths_B).tolist() == [0, 0, 2, 2, 2]
    assert place_in_response(lengths_B).tolist() == [0, 1, 0, 1, 2]
    assert sum_by_response(values_S, lengths_B).tolist() == [3.0, 0.0, 12.0]
    assert following(values_S, lengths_B).tolist() == [2.0, 0.0, 4.0, 5.0, 0.0]
    assert sum_before(values_S, lengths_B).tolist() == [0.0, 1.0, 0.0, 3.0, 7.0]
    grid_BR = to_grid(values_S, lengths_B)
    assert grid_BR.tolist() == [[1.0, 2.0, 0.0], [0.0, 0.0, 0.0], [3.0, 4.0, 5.0]]
    assert from_grid(grid_BR + 1, lengths_B).tolist() == [2.0, 3.0, 4.0, 5.0, 6.0]


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_a_batch_without_tokens_has_a_place_for_nothing(lengths: list[int]) -> None:
    lengths_B, nothing_S = torch.tensor(lengths, dtype=torch.int64), torch.zeros(0)
    assert to_grid(nothing_S, lengths_B).shape == (len(lengths), 0)
    assert len(following(nothing_S, lengths_B)) == len(from_grid(torch.zeros(len(lengths), 0), lengths_B)) == 0
    assert sum_by_response(nothing_S, lengths_B).tolist() == [0.0] * len(lengths)
    assert len(mean_return(nothing_S, lengths_B, gamma=0.9, normalize=True, first=1)) == 0


@pytest.mark.parametrize(("alpha", "first"), [(0.0, -7.5), (1.0, -2.5), (0.5, -7.5 / 3**0.5)])
def test_teacher_logprob_sums_to_the_length_normalised_score(alpha: float, first: float) -> None:
    out = teacher_logprob_rewards(rollout(), length_alpha=alpha)
    assert sum_by_response(out.rewards_S, torch.tensor([3, 1, 0])).tolist() == pytest.approx([first, -0.25, 0.0])
    assert out.parts_B["teacher_logprob"].tolist() == pytest.approx([first, -0.25, 0.0])
    assert out.returns_S is None


def test_a_teacher_logprob_reward_does_not_depend_on_later_tokens() -> None:
    # Running means of -1 -3 -5: -1, -2, -3; each token gets the change. A response cut short has the same first ones.
    logprobs_S = torch.tensor([-1.0, -3.0, -5.0, -1.0, -3.0])
    inputs = RewardInput(
        lengths_B=torch.tensor([3, 2]),
        finished_B=torch.tensor([True, False]),
        behavior_logprobs_S=logprobs_S,
        teacher_logprobs_S=logprobs_S,
        texts_B=["", ""],
        answers_B=[(), ()],
    )
    got = teacher_logprob_rewards(inputs, length_alpha=1.0)
    assert got.rewards_S.tolist() == pytest.approx([-1.0] * 5)
    assert teacher_logprob_rewards(inputs, length_alpha=0.0).rewards_S.tolist() == logprobs_S.tolist()


def test_minillm_with_the_single_step_term_credits_what_follows() -> None:
    out = minillm_rewards(rollout(), gamma=1.0, length_normalize=True, single_step=True)
    # r = [0.5, 1, -3]: after token 0 the mean of (1, -3), after token 1 -3, after the last nothing.
    assert out.returns_S is not None
    assert out.returns_S.tolist() == [-1.0, -3.0, 0.0, 0.0]
    assert out.rewards_S.tolist() == [1.0, -3.0, 0.0, 0.0]
    assert out.parts_B["minillm"].tolist() == pytest.approx([-1.5, 0.25, 0.0])


def test_minillm_discounts_what_follows() -> None:
    out = minillm_rewards(rollout(), gamma=0.5, length_normalize=False, single_step=True)
    assert out.returns_S is not None
    assert out.returns_S.tolist() == [1 - 0.5 * 3, -3.0, 0.0, 0.0]
    assert out.rewards_S.tolist() == [
        0.5,
        -1.5,
        0.0,
        0.0,
    ]  # added up from t on, discounted, these are 0.5 * the returns


def test_minillm_without_it_credits_the_token_as_well() -> None:
    out = minillm_rewards(rollout(), gamma=1.0, length_normalize=False, single_step=False)
    assert out.returns_S is not None
    assert out.returns_S.tolist() == [-1.5, -2.0, -3.0, 0.25]
    assert out.rewards_S.tolist() == [0.5, 1.0, -3.0, 0.25]


def test_discount_is_relative_and_normalised_alike() -> None:
    """Traps 2 and 3."""
    rewards_S = torch.tensor([1.0, 2.0, 4.0])
    got = mean_return(rewards_S, torch.tensor([3]), gamma=0.5, normalize=True, first=0)
    assert got.tolist() == pytest.approx([(1 + 1 + 1) / 1.75, (2 + 2) / 1.5, 4.0])
    plain = mean_return(rewards_S, torch.tensor([3]), gamma=0.5, normalize=False, first=1)
    assert plain.tolist() == pytest.approx([4.0, 4.0, 0.0])


def test_a_discount_does_not_underflow_on_long_responses() -> None:
    got = mean_return(torch.ones(4000), torch.tensor([4000]), gamma=0.5, normalize=True, first=1)
    assert torch.isfinite(got).all()
    assert torch.allclose(got[:-1], torch.ones(3999))


@pytest.mark.parametrize("first", [0, 1])
def test_another_response_never_enters_a_return(first: int) -> None:
    """Trap 1: the response that is laid behind, and the longer one that the recurrence is padded to."""
    alone = mean_return(torch.tensor([1.0, 2.0]), torch.tensor([2]), gamma=0.9, normalize=True, first=first)
    beside = mean_return(
        torch.tensor([1.0, 2.0, 50.0, 60.0, 70.0]), torch.tensor([2, 3]), gamma=0.9, normalize=True, first=first
    )
    assert torch.equal(alone, beside[:2])


def test_a_response_that_was_cut_is_scored_by_its_own_tokens() -> None:
    """Trap 15: the same tokens with and without an end symbol; nothing stands for a symbol that was not drawn."""
    inputs = RewardInput(
        lengths_B=torch.tensor([3, 2]),
        finished_B=torch.tensor([True, False]),
        behavior_logprobs_S=torch.zeros(5),
        teacher_logprobs_S=torch.tensor([-1.0, -2.0, -6.0, -1.0, -2.0]),
        texts_B=["", ""],
        answers_B=[(), ()],
    )
    scores_B = teacher_logprob_rewards(inputs, length_alpha=1.0).parts_B["teacher_logprob"]
    assert scores_B.tolist() == pytest.approx([-3.0, -1.5])
    returns_S = minillm_rewards(inputs, gamma=1.0, length_normalize=True, single_step=True).returns_S
    assert returns_S is not None
    assert returns_S.tolist() == [-4.0, -6.0, 0.0, -2.0, 0.0]


def test_a_sequence_value_sits_on_the_last_token() -> None:
    got = place_on_last_token(torch.tensor([5.0, 6.0, 7.0]), torch.tensor([2, 0, 3]))
    assert got.tolist() == [0.0, 5.0, 0.0, 0.0, 7.0]


def test_lpt_is_the_mean_cross_entropy_however_it_is_cut() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -3.0, -6.0])
    whole = lpt_loss(logprobs, 4)
    assert float(whole) == 3.0
    assert float(lpt_loss(logprobs[:1], 4) + lpt_loss(logprobs[1:], 4)) == 3.0
