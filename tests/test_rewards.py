"""Rewards against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from rewards.base import RewardInput, length_mask, place_on_last_token
from rewards.lpt_reward import lpt_loss
from rewards.minillm import mean_return, minillm_rewards
from rewards.teacher_logprob import teacher_logprob_rewards


def rollout() -> RewardInput:
    return RewardInput(
        lengths_B=torch.tensor([3, 1, 0]),
        finished_B=torch.tensor([True, True, False]),
        behavior_logprobs_BR=torch.tensor([[-1.0, -2.0, -3.0], [-0.5, 7.0, 7.0], [7.0, 7.0, 7.0]]),
        teacher_logprobs_BR=torch.tensor([[-0.5, -1.0, -6.0], [-0.25, 8.0, 8.0], [8.0, 8.0, 8.0]]),
        texts=["a", "b", ""],
        answers=[(), (), ()],
    )


def test_masks_come_from_lengths() -> None:
    assert length_mask(torch.tensor([2, 0, 3]), 3).tolist() == [
        [True, True, False], [False, False, False], [True, True, True],
    ]  # fmt: skip


@pytest.mark.parametrize(("alpha", "first"), [(0.0, -7.5), (1.0, -2.5), (0.5, -7.5 / 3**0.5)])
def test_teacher_logprob_sums_to_the_length_normalised_score(alpha: float, first: float) -> None:
    out = teacher_logprob_rewards(rollout(), length_alpha=alpha)
    assert out.rewards_BR.sum(1).tolist() == pytest.approx([first, -0.25, 0.0])
    assert out.parts["teacher_logprob"].tolist() == pytest.approx([first, -0.25, 0.0])
    assert out.returns_BR is None
    assert out.rewards_BR[1, 1:].tolist() == [0.0, 0.0]


def test_a_teacher_logprob_reward_does_not_depend_on_later_tokens() -> None:
    # Running means of -1 -3 -5: -1, -2, -3; each token gets the change. A response cut short has the same first ones.
    logprobs = torch.tensor([[-1.0, -3.0, -5.0], [-1.0, -3.0, 9.0]])
    inputs = RewardInput(
        lengths_B=torch.tensor([3, 2]), finished_B=torch.tensor([True, False]), behavior_logprobs_BR=logprobs,
        teacher_logprobs_BR=logprobs, texts=["", ""], answers=[(), ()],
    )  # fmt: skip
    got = teacher_logprob_rewards(inputs, length_alpha=1.0)
    assert got.rewards_BR[0].tolist() == pytest.approx([-1.0, -1.0, -1.0])
    assert got.rewards_BR[1].tolist() == [-1.0, -1.0, 0.0]
    assert teacher_logprob_rewards(inputs, length_alpha=0.0).rewards_BR.tolist() == [[-1.0, -3.0, -5.0], [-1, -3, 0]]


def test_minillm_with_the_single_step_term_credits_what_follows() -> None:
    out = minillm_rewards(rollout(), gamma=1.0, length_normalize=True, single_step=True)
    # r = [0.5, 1, -3]: after token 0 the mean of (1, -3), after token 1 -3, after the last nothing.
    assert out.returns_BR is not None
    assert out.returns_BR.tolist() == [[-1.0, -3.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert out.rewards_BR.tolist() == [[1.0, -3.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert out.parts["minillm"].tolist() == pytest.approx([-1.5, 0.25, 0.0])


def test_minillm_without_it_credits_the_token_as_well() -> None:
    out = minillm_rewards(rollout(), gamma=1.0, length_normalize=False, single_step=False)
    assert out.returns_BR is not None
    assert out.returns_BR.tolist() == [[-1.5, -2.0, -3.0], [0.25, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert out.rewards_BR[0].tolist() == [0.5, 1.0, -3.0]


def test_discount_is_relative_and_normalised_alike() -> None:
    """Traps 2 and 3."""
    rewards = torch.tensor([[1.0, 2.0, 4.0]])
    got = mean_return(rewards, torch.tensor([3]), gamma=0.5, normalize=True, first=0)
    assert got[0].tolist() == pytest.approx([(1 + 1 + 1) / 1.75, (2 + 2) / 1.5, 4.0])
    plain = mean_return(rewards, torch.tensor([3]), gamma=0.5, normalize=False, first=1)
    assert plain[0].tolist() == pytest.approx([4.0, 4.0, 0.0])


def test_a_discount_does_not_underflow_on_long_responses() -> None:
    got = mean_return(torch.ones(1, 4000), torch.tensor([4000]), gamma=0.5, normalize=True, first=1)
    assert torch.isfinite(got).all()
    assert torch.allclose(got[0, :-1], torch.ones(3999))


def test_padding_never_enters_a_return() -> None:
    """Trap 1."""
    short = mean_return(torch.tensor([[1.0, 2.0]]), torch.tensor([2]), gamma=0.9, normalize=True, first=0)
    padded = mean_return(torch.tensor([[1.0, 2.0, 50.0, 60.0]]), torch.tensor([2]), gamma=0.9, normalize=True, first=0)
    assert torch.equal(short, padded[:, :2])
    assert padded[0, 2:].tolist() == [0.0, 0.0]


def test_a_response_that_was_cut_is_scored_by_its_own_tokens() -> None:
    """Trap 15: the same tokens with and without an end symbol; nothing stands for a symbol that was not drawn."""
    logprobs = torch.tensor([[-1.0, -2.0, -6.0], [-1.0, -2.0, 0.0]])
    inputs = RewardInput(
        lengths_B=torch.tensor([3, 2]), finished_B=torch.tensor([True, False]), texts=["", ""], answers=[(), ()],
        behavior_logprobs_BR=torch.zeros(2, 3), teacher_logprobs_BR=logprobs,
    )  # fmt: skip
    assert teacher_logprob_rewards(inputs, length_alpha=1.0).rewards_BR.sum(1).tolist() == pytest.approx([-3.0, -1.5])
    returns = minillm_rewards(inputs, gamma=1.0, length_normalize=True, single_step=True).returns_BR
    assert returns is not None
    assert returns.tolist() == [[-4.0, -6.0, 0.0], [-2.0, 0.0, 0.0]]


def test_a_sequence_value_sits_on_the_last_token() -> None:
    got = place_on_last_token(torch.tensor([5.0, 6.0, 7.0]), torch.tensor([2, 0, 3]), 3)
    assert got.tolist() == [[0.0, 5.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 7.0]]


def test_lpt_is_the_mean_cross_entropy_however_it_is_cut() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -3.0, -6.0])
    whole = lpt_loss(logprobs, 4)
    assert float(whole) == 3.0
    assert float(lpt_loss(logprobs[:1], 4) + lpt_loss(logprobs[1:], 4)) == 3.0
