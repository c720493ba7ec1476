"""Advantages against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from configs.schema import GRPOConfig, PPOConfig
from rewards.base import RewardOutput
from training.advantages import gae, group_scores_advantage, group_token_advantage, masked_sums, whiten
from training.grpo import grpo_advantages
from training.ppo import next_kl_coefficient, penalised_rewards, ppo_advantages


def test_group_scores_by_hand() -> None:
    # Group 1: mean 2, deviations -1 0 1, sample deviation 1. Group 2: mean 5, deviations -3 3 0, deviation 3.
    got = group_scores_advantage(torch.tensor([1.0, 2.0, 3.0, 2.0, 8.0, 5.0]), 3, scale="group", epsilon=0.0)
    assert got.tolist() == pytest.approx([-1, 0, 1, -1, 1, 0])
    unscaled = group_scores_advantage(torch.tensor([1.0, 2.0, 3.0]), 3, scale="none", epsilon=0.0)
    assert unscaled.tolist() == pytest.approx([-1, 0, 1])


def test_leave_one_out_by_hand() -> None:
    # The others' means are 4, 3.5 and 1.5.
    scores = torch.tensor([1.0, 2.0, 6.0])
    got = group_scores_advantage(scores, 3, scale="none", epsilon=0.0, baseline="leave_one_out")
    assert got.tolist() == pytest.approx([-3.0, -1.5, 4.5])
    # Tokens 1 3 | 5: the others' mean is 5 for the first response and 2 for the second.
    returns, lengths = torch.tensor([[1.0, 3.0, 99.0], [5.0, 99.0, 99.0]]), torch.tensor([2, 1])
    tokens = group_token_advantage(returns, lengths, 2, scale="none", epsilon=0.0, baseline="leave_one_out")
    assert tokens.tolist() == [[-4.0, -2.0, 0.0], [3.0, 0.0, 0.0]]
    scaled = group_token_advantage(returns, lengths, 2, scale="group", epsilon=0.0, baseline="leave_one_out")
    assert scaled.tolist() == [[-2.0, -1.0, 0.0], [1.5, 0.0, 0.0]]  # sample deviation of 1 3 5 is 2
    for function in (
        lambda: group_scores_advantage(scores, 3, scale="none", epsilon=0.0, baseline="median"),
        lambda: group_token_advantage(returns, lengths, 2, scale="none", epsilon=0.0, baseline="median"),
    ):
        with pytest.raises(ValueError, match="use mean or leave_one_out"):
            function()


@pytest.mark.parametrize("epsilon", [0.0, 1e-4])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["group", "none"])
def test_equal_scores_give_exactly_zero(scale: str, baseline: str, epsilon: float) -> None:
    """0.1 is not a float: the mean of three differs from each in the last bit."""
    scores = torch.tensor([0.1, 0.1, 0.1, 1.0, 2.0, 3.0])
    got = group_scores_advantage(scores, 3, scale=scale, epsilon=epsilon, baseline=baseline)
    assert got[:3].tolist() == [0.0] * 3
    assert got[3:].abs().tolist() != [0.0] * 3
    returns, lengths = torch.full((6, 7), 0.1), torch.tensor([7, 3, 5, 1, 2, 1])
    returns[3] = 2.0
    tokens = group_token_advantage(returns, lengths, 3, scale=scale, epsilon=epsilon, baseline=baseline)
    assert tokens[:3].abs().max() == 0.0
    assert tokens[3, 0] > 0.0


def test_token_advantages_use_real_tokens_only() -> None:
    """Trap 5: group statistics over pads."""
    returns = torch.tensor([[1.0, 3.0, 99.0], [5.0, 99.0, 99.0]])
    got = group_token_advantage(returns, torch.tensor([2, 1]), 2, scale="group", epsilon=0.0)
    # Tokens 1 3 5: mean 3, sample deviation 2.
    assert got.tolist() == [[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]


def test_an_empty_response_takes_no_part() -> None:
    returns = torch.tensor([[1.0, 3.0], [7.0, 7.0]])
    got = group_token_advantage(returns, torch.tensor([2, 0]), 2, scale="none", epsilon=0.0)
    assert got.tolist() == [[-1.0, 1.0], [0.0, 0.0]]


def test_gae_by_hand() -> None:
    rewards = torch.tensor([[1.0, 2.0, 4.0], [3.0, 50.0, 50.0]])
    values = torch.tensor([[0.5, 1.0, 2.0], [1.0, 70.0, 70.0]])
    advantages, returns = gae(rewards, values, torch.tensor([3, 1]), gamma=0.5, lam=0.5)
    # delta = [1 + .5*1 - .5, 2 + .5*2 - 1, 4 - 2] = [1, 2, 2]; A2 = 2, A1 = 2 + .25*2 = 2.5, A0 = 1 + .25*2.5 = 1.625
    assert advantages.tolist() == [[1.625, 2.5, 2.0], [2.0, 0.0, 0.0]]
    assert returns.tolist() == [[2.125, 3.5, 4.0], [3.0, 0.0, 0.0]]


def test_gae_of_a_response_that_was_cut_takes_nothing_from_past_its_end() -> None:
    """Traps 15 and 21: no value after the last token, whether it is an end symbol or the longest allowed one."""
    rewards, values = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 0.25]])
    cut, _ = gae(rewards, values, torch.tensor([2]), gamma=1.0, lam=1.0)
    assert cut.tolist() == [[2.5, 1.75]]
    longer = torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[0.5, 0.25, 7.0]])
    beside_a_longer_one, returns = gae(*longer, torch.tensor([2]), gamma=1.0, lam=1.0)
    assert beside_a_longer_one.tolist() == [[2.5, 1.75, 0.0]]
    assert returns.tolist() == [[3.0, 2.0, 0.0]]


def test_gae_with_lambda_one_is_the_return_minus_the_value() -> None:
    rewards = torch.tensor([[0.3, -0.2, 1.0]])
    advantages, _ = gae(rewards, torch.tensor([[0.1, 0.2, 0.3]]), torch.tensor([3]), gamma=1.0, lam=1.0)
    assert advantages[0].tolist() == pytest.approx([1.1 - 0.1, 0.8 - 0.2, 1.0 - 0.3])


def test_whitening_ignores_padding() -> None:
    mask = torch.tensor([[True, True, False]])
    values = torch.tensor([[1.0, 3.0, 1000.0]])
    count, total, squares = masked_sums(values, mask).tolist()
    assert (count, total, squares) == (2.0, 4.0, 10.0)
    assert whiten(values, mask, (count, total, squares))[0].tolist() == pytest.approx([-1.0, 1.0, 0.0])


def test_grpo_spreads_a_sequence_score_over_its_tokens() -> None:
    rewards = torch.tensor([[0.0, 1.0], [3.0, 0.0]])
    got = grpo_advantages(
        RewardOutput(rewards, None, {}), torch.tensor([2, 1]), 2, GRPOConfig(scale="none", epsilon=0.0)
    )
    assert got.tolist() == [[-1.0, -1.0], [1.0, 0.0]]


def test_grpo_batch_scale_divides_all_groups_alike() -> None:
    rewards = torch.tensor([[0.0], [2.0], [0.0], [6.0]])
    got = grpo_advantages(
        RewardOutput(rewards, None, {}), torch.tensor([1, 1, 1, 1]), 2, GRPOConfig(scale="batch", epsilon=0.0)
    )
    # Centred: -1 1 -3 3; root mean square sqrt(5).
    assert got[:, 0].tolist() == pytest.approx([x / 5**0.5 for x in (-1, 1, -3, 3)])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("epsilon", [0.0, 1e-4])
def test_a_batch_without_any_signal_gives_zero(scale: str, epsilon: float) -> None:
    config = GRPOConfig(scale=scale, epsilon=epsilon)  # type: ignore[arg-type]
    rewards, lengths = torch.full((4, 1), 0.1), torch.tensor([1, 1, 1, 1])
    for returns in (None, rewards):
        got = grpo_advantages(RewardOutput(rewards, returns, {}), lengths, 2, config)
        assert got.tolist() == [[0.0]] * 4


def test_ppo_penalises_the_distance_to_the_reference() -> None:
    mask = torch.tensor([[True, True, False]])
    got = penalised_rewards(
        torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[-2.0, -1.0, 9.0]]), mask, 0.5
    )
    assert got.tolist() == [[0.5, 1.5, 0.0]]


def test_ppo_advantages_are_gae_of_the_penalised_reward() -> None:
    config = PPOConfig(gamma=1.0, gae_lambda=1.0, whiten=False)
    advantages, returns = ppo_advantages(
        RewardOutput(torch.tensor([[0.0, 1.0]]), None, {}), torch.tensor([2]), torch.tensor([[-1.0, -1.0]]),
        torch.tensor([[-1.5, -1.0]]), torch.tensor([[0.25, 0.5]]), config, kl_coef=0.2,
    )  # fmt: skip
    assert returns[0].tolist() == pytest.approx([0.9, 1.0])
    assert advantages[0].tolist() == pytest.approx([0.65, 0.5])


def test_the_adaptive_coefficient_moves_towards_its_target() -> None:
    adaptive = PPOConfig(kl_target=0.1, kl_horizon=100)
    assert next_kl_coefficient(1.0, 0.2, adaptive, 50) == pytest.approx(1.1)  # error clipped at 0.2
    assert next_kl_coefficient(1.0, 0.09, adaptive, 50) == pytest.approx(0.95)
    assert next_kl_coefficient(1.0, 9.0, PPOConfig(kl_target=None), 50) == 1.0
