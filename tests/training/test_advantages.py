"""Advantages against numbers worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from configs.schema import GRPOConfig, PPOConfig, RunConfig, SamplingConfig
from rewards.base import RewardOutput
from tests.support.experiences import experience_of, prompts_of, rollout_of
from training import distributed
from training.advantages import gae, group_scores_advantage, group_token_advantage, has_signal, moments_of, whiten
from training.collect import make_experience
from training.experience import Rewarded
from training.grpo import grpo_advantages
from training.ppo import KL_RANGE, PPO, next_kl_coefficient, penalised_rewards

PLAIN = GRPOConfig(scale="none", epsilon=0.0)
SCALED = GRPOConfig(scale="group", epsilon=0.0)
LEAVE_ONE_OUT = GRPOConfig(scale="none", epsilon=0.0, baseline="leave_one_out")


def test_group_scores_by_hand() -> None:
    # Group 1: mean 2, deviations -1 0 1, sample deviation 1. Group 2: mean 5, deviations -3 3 0, deviation 3.
    got = group_scores_advantage(torch.tensor([1.0, 2.0, 3.0, 2.0, 8.0, 5.0]), 3, SCALED)
    assert got.tolist() == pytest.approx([-1, 0, 1, -1, 1, 0])
    assert group_scores_advantage(torch.tensor([1.0, 2.0, 3.0]), 3, PLAIN).tolist() == pytest.approx([-1, 0, 1])


def test_epsilon_is_added_to_the_deviation() -> None:
    # Of 1 2 3 that is 1, of the tokens 1 3 5 it is 2, of the batch's -1 1 it is 1.
    group, batch = (GRPOConfig(scale=scale, epsilon=1.0) for scale in ("group", "batch"))  # type: ignore[arg-type]
    assert group_scores_advantage(torch.tensor([1.0, 2.0, 3.0]), 3, group).tolist() == [-0.5, 0.0, 0.5]
    tokens_S = group_token_advantage(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([2, 1]), 2, group)
    assert tokens_S.tolist() == pytest.approx([-2 / 3, 0.0, 2 / 3])
    reward = RewardOutput(torch.tensor([0.0, 2.0]), None, {})
    assert grpo_advantages(reward, torch.tensor([1, 1]), 2, batch).tolist() == [-0.5, 0.5]


def test_leave_one_out_by_hand() -> None:
    # The others' means are 4, 3.5 and 1.5.
    got = group_scores_advantage(torch.tensor([1.0, 2.0, 6.0]), 3, LEAVE_ONE_OUT)
    assert got.tolist() == pytest.approx([-3.0, -1.5, 4.5])
    # Tokens 1 3 | 5: the others' mean is 5 for the first response and 2 for the second.
    returns_S, lengths_B = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([2, 1])
    assert group_token_advantage(returns_S, lengths_B, 2, LEAVE_ONE_OUT).tolist() == [-4.0, -2.0, 3.0]
    scaled = group_token_advantage(
        returns_S, lengths_B, 2, GRPOConfig(scale="group", epsilon=0.0, baseline="leave_one_out")
    )
    assert scaled.tolist() == [-2.0, -1.0, 1.5]  # sample deviation of 1 3 5 is 2


@pytest.mark.parametrize("epsilon", [0.0, 1e-4])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["group", "none"])
def test_equal_scores_give_exactly_zero(scale: str, baseline: str, epsilon: float) -> None:
    """0.1 is not a float: the mean of three differs from each in the last bit."""
    config = GRPOConfig(scale=scale, epsilon=epsilon, baseline=baseline)  # type: ignore[arg-type]
    got = group_scores_advantage(torch.tensor([0.1, 0.1, 0.1, 1.0, 2.0, 3.0]), 3, config)
    assert got[:3].tolist() == [0.0] * 3
    assert got[3:].abs().tolist() != [0.0] * 3
    lengths_B = torch.tensor([7, 3, 5, 1, 2, 1])
    returns_S = torch.full((19,), 0.1)
    returns_S[15] = 2.0
    tokens_S = group_token_advantage(returns_S, lengths_B, 3, config)
    assert tokens_S[:15].abs().max() == 0.0
    assert tokens_S[15] > 0.0


def test_a_group_is_compared_with_itself_only() -> None:
    # Tokens 1 3 5: mean 3, sample deviation 2; the second group is another's business.
    returns_S = torch.tensor([1.0, 3.0, 5.0, 100.0, 300.0])
    got = group_token_advantage(returns_S, torch.tensor([2, 1, 1, 1]), 2, SCALED)
    assert got.tolist() == pytest.approx([-1.0, 0.0, 1.0, -(0.5**0.5), 0.5**0.5])


def test_an_empty_response_takes_no_part() -> None:
    got = group_token_advantage(torch.tensor([1.0, 3.0]), torch.tensor([2, 0]), 2, PLAIN)
    assert got.tolist() == [-1.0, 1.0]
    assert group_token_advantage(torch.zeros(0), torch.tensor([0, 0]), 2, SCALED).tolist() == []


def test_a_group_has_signal_where_its_responses_are_credited_otherwise() -> None:
    def signal(rewards: list[float], returns: list[float] | None) -> list[bool]:
        rollout = rollout_of(prompts_of([(1,), (2,), (3,)]), [(1, 2), (3,), (4,), (5,), (), ()])
        scored = experience_of(rollout, torch.zeros(5)).scored
        returns_S = None if returns is None else torch.tensor(returns)
        return has_signal(Rewarded(scored, RewardOutput(torch.tensor(rewards), returns_S, {}))).tolist()

    assert signal([1.0, 2.0, 3.0, 4.0, 4.5], None) == [False, True, False]  # 1 + 2 is 3; two empty responses
    assert signal([0.0] * 5, [1.0, 1.0, 1.0, 2.0, 2.5]) == [False, True, False]
    assert signal([0.0] * 5, [1.0, 1.5, 1.0, 2.0, 2.0]) == [True, False, False]


@pytest.mark.parametrize(("recipe", "kept"), [("rl", 0), ("seqkd", 2), ("gkd", 2)])
def test_groups_without_signal_are_skipped_only_where_advantages_teach(recipe: str, kept: int) -> None:
    """Sequence-level distillation learns from the teacher's answer of every group, however it is scored."""
    config = RunConfig(recipe=recipe, grpo=GRPOConfig(no_signal="skip"))
    rollout = rollout_of(prompts_of([(1,), (2,)]), [(1, 2), (3,), (4,), (5,)])
    rewarded = experience_of(rollout, torch.zeros(5)).rewarded
    experience, dropped = make_experience(SimpleNamespace(config=config), rewarded, 0.0)  # type: ignore[arg-type]
    assert (len(experience.rollout.prompts_N), dropped) == (kept, 0)


def test_gae_by_hand() -> None:
    rewards_S, values_S = torch.tensor([1.0, 2.0, 4.0, 3.0]), torch.tensor([0.5, 1.0, 2.0, 1.0])
    advantages_S, returns_S = gae(rewards_S, values_S, torch.tensor([3, 1]), gamma=0.5, lam=0.5)
    # delta = [1 + .5*1 - .5, 2 + .5*2 - 1, 4 - 2] = [1, 2, 2]; A2 = 2, A1 = 2 + .25*2 = 2.5, A0 = 1 + .25*2.5 = 1.625
    assert advantages_S.tolist() == [1.625, 2.5, 2.0, 2.0]
    assert returns_S.tolist() == [2.125, 3.5, 4.0, 3.0]


def test_gae_of_a_response_that_was_cut_takes_nothing_from_past_its_end() -> None:
    """Traps 15 and 21: no value after the last token, whether it is an end symbol or the longest allowed one, and
    nothing of the response that is laid behind it."""
    alone, _ = gae(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.25]), torch.tensor([2]), gamma=1.0, lam=1.0)
    assert alone.tolist() == [2.5, 1.75]
    rewards_S, values_S = torch.tensor([1.0, 2.0, 9.0]), torch.tensor([0.5, 0.25, 7.0])
    beside, returns_S = gae(rewards_S, values_S, torch.tensor([2, 1]), gamma=1.0, lam=1.0)
    assert beside.tolist() == [2.5, 1.75, 2.0]
    assert returns_S.tolist() == [3.0, 2.0, 9.0]


def test_gae_with_lambda_one_is_the_return_minus_the_value() -> None:
    advantages_S, _ = gae(
        torch.tensor([0.3, -0.2, 1.0]), torch.tensor([0.1, 0.2, 0.3]), torch.tensor([3]), gamma=1.0, lam=1.0
    )
    assert advantages_S.tolist() == pytest.approx([1.1 - 0.1, 0.8 - 0.2, 1.0 - 0.3])


def test_whitening_by_hand() -> None:
    values_S = torch.tensor([1.0, 5.0])
    assert moments_of(values_S).tolist() == [2.0, 6.0, 26.0]
    assert whiten(values_S, moments_of(values_S)).tolist() == pytest.approx([-1.0, 1.0])
    far_S = torch.tensor([4096.0, 4097.0])  # float32 squares would lose their difference
    assert whiten(far_S, moments_of(far_S)).tolist() == pytest.approx([-1.0, 1.0], abs=1e-6)
    alike_S = torch.full((49,), 3.3)  # whose variance rounds to less than nothing
    alike_S = whiten(alike_S, moments_of(alike_S))
    assert (alike_S.dtype, alike_S.tolist()) == (torch.float32, [0.0] * 49), "not complex"
    assert whiten(torch.zeros(0), moments_of(torch.zeros(0))).tolist() == []


def test_grpo_spreads_a_sequence_score_over_its_tokens() -> None:
    reward = RewardOutput(torch.tensor([0.0, 1.0, 3.0]), None, {})
    assert grpo_advantages(reward, torch.tensor([2, 1]), 2, PLAIN).tolist() == [-1.0, -1.0, 1.0]


def test_grpo_batch_scale_divides_all_groups_alike() -> None:
    reward = RewardOutput(torch.tensor([0.0, 2.0, 0.0, 6.0]), None, {})
    got = grpo_advantages(reward, torch.ones(4, dtype=torch.int64), 2, GRPOConfig(scale="batch", epsilon=0.0))
    # Centred: -1 1 -3 3; root mean square sqrt(5).
    assert got.tolist() == pytest.approx([x / 5**0.5 for x in (-1, 1, -3, 3)])
    # Over tokens their mean is not 0: -1 -1 1 have -1/3 and a deviation of sqrt(8/9); the scale alone is the batch's.
    config, reward = GRPOConfig(scale="batch", epsilon=0.0), RewardOutput(torch.tensor([0.0, 0.0, 2.0]), None, {})
    got = grpo_advantages(reward, torch.tensor([2, 1]), 2, config)
    assert got.tolist() == pytest.approx([x * (9 / 8) ** 0.5 for x in (-1, -1, 1)])


def test_scale_and_whitening_are_those_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rank has the advantages 3 and -3. What the critic learns is not whitened."""
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda moments: moments + moments_of(torch.tensor([3.0, -3.0])))
    reward = RewardOutput(torch.tensor([0.0, 2.0]), None, {})
    got = grpo_advantages(reward, torch.tensor([1, 1]), 2, GRPOConfig(scale="batch", epsilon=0.0))
    assert got.tolist() == pytest.approx([-1 / 5**0.5, 1 / 5**0.5])
    config = RunConfig(algo="ppo", ppo=PPOConfig(gamma=1.0, gae_lambda=1.0, whiten=True))
    rollout = rollout_of(prompts_of([(1,), (2,)]), [(5,), (6,)])
    scored = experience_of(rollout, torch.zeros(2), values_S=torch.tensor([1.0, 1.0])).scored
    advantages_S, returns_S = PPO().advantages(Rewarded(scored, reward), config, kl_coef=0.0)
    assert advantages_S.tolist() == pytest.approx([-1 / 5**0.5, 1 / 5**0.5])
    assert returns_S is not None
    assert returns_S.tolist() == [0.0, 2.0]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("epsilon", [0.0, 1e-4])
def test_a_batch_without_any_signal_gives_zero(scale: str, epsilon: float) -> None:
    config = GRPOConfig(scale=scale, epsilon=epsilon)  # type: ignore[arg-type]
    rewards_S, lengths_B = torch.full((4,), 0.1), torch.ones(4, dtype=torch.int64)
    for returns_S in (None, rewards_S):
        assert grpo_advantages(RewardOutput(rewards_S, returns_S, {}), lengths_B, 2, config).tolist() == [0.0] * 4


def test_ppo_penalises_the_distance_to_the_reference() -> None:
    got = penalised_rewards(torch.tensor([1.0, 1.0]), torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -1.0]), 0.5)
    assert got.tolist() == [0.5, 1.5]


def test_ppo_advantages_are_gae_of_the_penalised_reward() -> None:
    config = RunConfig(algo="ppo", ppo=PPOConfig(gamma=0.5, gae_lambda=1.0, whiten=False))
    rollout = rollout_of(prompts_of([(1,)]), [(5, 6)], torch.tensor([-1.0, -1.0]))
    scored = experience_of(
        rollout,
        torch.zeros(2),
        reference_logprobs_S=torch.tensor([-1.5, -1.0]),
        values_S=torch.tensor([0.25, 0.5]),
    ).scored
    batch = Rewarded(scored, RewardOutput(torch.tensor([0.0, 1.0]), None, {}))
    advantages_S, returns_S = PPO().advantages(batch, config, kl_coef=0.2)
    assert returns_S is not None
    assert returns_S.tolist() == pytest.approx([-0.1 + 0.5, 1.0])
    assert advantages_S.tolist() == pytest.approx([0.15, 0.5])
    assert PPO().needs_reference(config)
    assert not PPO().needs_reference(RunConfig(ppo=PPOConfig(kl_penalty=0.0)))


def test_the_adaptive_coefficient_moves_towards_its_target() -> None:
    adaptive = PPOConfig(kl_target=0.1)
    assert next_kl_coefficient(1.0, 0.2, adaptive, 500) == pytest.approx(1.1)  # error clipped at 0.2
    assert next_kl_coefficient(1.0, 0.09, adaptive, 500) == pytest.approx(0.95)
    assert next_kl_coefficient(1.0, 0.05, adaptive, 8192) == pytest.approx(0.8)  # never below 0
    assert next_kl_coefficient(1.0, 9.0, PPOConfig(kl_target=None), 50) == 1.0
    # 0.2 above the target at most; 50 prompts of 4 responses are a fifth of the horizon.
    config, metrics = RunConfig(prompts_per_step=50, sampling=SamplingConfig(group_size=4), ppo=adaptive), {"a": 1.0}
    assert PPO().after_step(metrics, config, 2.0) == 2.0
    metrics |= {"kl/reference": 0.2, "kl/teacher": 0.0}
    assert PPO().after_step(metrics, config, 2.0) == pytest.approx(2.0 * 1.04)
    assert metrics["ppo/kl_coef"] == 2.0, "the one that was in force"
    # One step whose loss was not a number would make every later reward so.
    assert next_kl_coefficient(1.0, float("nan"), adaptive, 500) == 1.0


@pytest.mark.parametrize(("kl", "end"), [(0.01, 0.02 / KL_RANGE), (5.0, 0.02 * KL_RANGE)])
def test_the_adaptive_coefficient_in_a_long_run(kl: float, end: float) -> None:
    """100,000 steps on one side of the target: 0 could never rise again, and infinity is no coefficient."""
    config, coef = PPOConfig(kl_penalty=0.02, kl_target=0.1), 0.02
    for _ in range(100_000):
        coef = next_kl_coefficient(coef, kl, config, 512)
    assert coef == end
    for _ in range(100):
        coef = next_kl_coefficient(coef, 0.1 * 0.1 / kl, config, 512)
    assert coef > 0.02 if kl < 0.1 else coef < 0.02
