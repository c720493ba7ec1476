"""Expected gradients with samples that are not the policy's own: mixed with the teacher's, or another policy's.

Over all responses, in float64, as in test_enumeration.py; `off_by` is a bias as a share of the exact gradient.
"""

from __future__ import annotations

import pytest
import torch

from configs.schema import GRPOConfig, RunConfig, SamplingConfig
from rewards.base import RewardOutput
from rewards.minillm import minillm_rewards, mixture_importance, reverse_kl
from tests.support.enumeration import World, centred_scores, expected, gradient, off_by, ones, scores, single_step
from tests.support.experiences import prompts_of, rollout_of
from training.grpo import grpo_advantages
from training.losses import forward_kl, kl_loss, truncated_importance

WORLDS = [World(3, 4), World(4, 3), World(5, 3), World(3, 3, ends=False)]
EXACT = 1e-9


def mixture_of(world: World, share: float) -> torch.Tensor:
    """Log-probabilities of the token-by-token mixture: `share` of the teacher."""
    table, teacher = world.table(0).detach(), world.table(1).detach()
    return (share * teacher.softmax(-1) + (1 - share) * table.softmax(-1)).log()


def mixed(world: World, by: str, *, minillm: bool, share: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """Expected gradient with samples of the mixture, and the exact one: of the score, or of the reverse KL."""
    table, teacher = world.table(0), world.table(1)
    mixture = mixture_of(world, share)
    behavior_S, sampled_S = world.logprobs(table).detach(), world.logprobs(mixture)
    importance_S = mixture_importance(behavior_S, sampled_S, world.lengths_B, by=by)
    weights_S = expected(world, table, drawn_from=world.total(sampled_S).exp())
    if not minillm:
        score_B = centred_scores(world, table)
        exact = gradient((world.probabilities(table) * score_B).sum(), table)
        credit_S = world.each(score_B)
        return -gradient(world.surrogate(table, credit_S, weights_S, importance_S=importance_S), table), exact
    reward = minillm_rewards(world.inputs(table, teacher), gamma=1.0, length_normalize=False, single_step=True)
    assert reward.returns_S is not None
    loss = world.surrogate(table, reward.returns_S, weights_S, importance_S=importance_S)
    loss = loss + single_step(world, table, teacher, weights_S * importance_S)
    return gradient(loss, table), gradient(world.reverse_kl(table, teacher), table)


@pytest.mark.parametrize("minillm", [False, True])
@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_teacher_mixed_sampling_with_sequence_weights_is_exact(world: World, minillm: bool) -> None:
    """The single-step part is weighted as well: its states were visited by the mixture."""
    assert off_by(*mixed(world, "sequence", minillm=minillm)) < EXACT


@pytest.mark.parametrize(("minillm", "bias"), [(False, 0.3893), (True, 0.3124)])
def test_teacher_mixed_sampling_with_token_weights_is_biased(minillm: bool, bias: float) -> None:
    """The paper's approximation leaves out how the state was reached and what followed; one token has neither."""
    assert off_by(*mixed(WORLDS[0], "token", minillm=minillm)) == pytest.approx(bias, abs=5e-3)
    assert off_by(*mixed(World(4, 1, ends=False), "token", minillm=minillm)) < EXACT


@pytest.mark.parametrize("size", [2, 3])
def test_mixed_samples_in_groups_are_exact_with_the_others_as_baseline(size: int) -> None:
    """The others were drawn from the mixture too, but not with this response: their mean takes no bias in."""
    world = World(3, 3)
    table = world.table(0)
    mixture = mixture_of(world, 0.3)
    rows, chances = world.groups(mixture, size)
    at = world.places(rows)
    reward = RewardOutput(scores(world, world.table(1))[at], None, {})
    config = GRPOConfig(baseline="leave_one_out", scale="none", epsilon=0.0)
    credit_S = grpo_advantages(reward, world.lengths_B[rows], size, config)
    importance_S = mixture_importance(
        world.logprobs(table).detach(), world.logprobs(mixture), world.lengths_B, by="sequence"
    )
    chances_S = chances.repeat_interleave(size).repeat_interleave(world.lengths_B[rows])
    weights_S = ones(world, rows, responses=float(size)) * chances_S
    ours = -gradient(world.surrogate(table, credit_S, weights_S, importance_S=importance_S[at], rows=rows), table)
    exact = gradient((world.probabilities(table) * world.total(scores(world, world.table(1)))).sum(), table)
    assert off_by(ours, exact) < 1e-6


def test_responses_that_the_teacher_wrote_whole_are_exact() -> None:
    """sampling.mix_by response: q(y) = alpha p_T(y) + (1 - alpha) pi(y), one weight a response, at most 1/(1-alpha)."""
    from training.teacher.link import all_read
    from training.teacher.mixing import importance_of

    world, alpha = World(3, 4), 0.4
    table, teacher = world.table(0), world.table(1)
    behavior_S, teacher_S = world.logprobs(table).detach(), world.logprobs(teacher).detach()
    rollout = rollout_of(prompts_of([(0,)]), world.responses, behavior_S)
    config = RunConfig(sampling=SamplingConfig(teacher_mix=alpha, mix_by="response"))
    importance_S = importance_of(rollout, all_read(rollout, teacher_S), config)
    assert importance_S is not None
    assert float(importance_S.max()) <= 1 / (1 - alpha)
    drawn_B = alpha * world.total(teacher_S).exp() + (1 - alpha) * world.total(behavior_S).exp()
    weights_S = expected(world, table, drawn_from=drawn_B)
    reward = minillm_rewards(world.inputs(table, teacher), gamma=1.0, length_normalize=False, single_step=True)
    assert reward.returns_S is not None
    loss = world.surrogate(table, reward.returns_S, weights_S, importance_S=importance_S)
    ours = gradient(loss + single_step(world, table, teacher, weights_S * importance_S), table)
    assert off_by(ours, gradient(world.reverse_kl(table, teacher), table)) < EXACT


def off_policy(world: World, cap: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Samples of pi_b, trained at pi: gradient by truncated importance, by the policy ratio, and the exact one."""
    table, behavior = world.table(0), world.table(7, scale=0.7).detach()
    score_B = centred_scores(world, behavior)
    score_S = world.each(score_B)
    weights_S = expected(world, behavior)
    importance_S = truncated_importance(world.logprobs(table), world.logprobs(behavior), cap)
    assert not importance_S.requires_grad
    ours = -gradient(world.surrogate(table, score_S, weights_S, importance_S=importance_S), table)
    ratio = -gradient(world.surrogate(table, score_S, weights_S, behavior=behavior), table)
    return ours, ratio, gradient((world.probabilities(table) * score_B).sum(), table)


def test_truncated_importance_is_exact_for_one_token() -> None:
    ours, ratio, exact = off_policy(World(5, 1, ends=False), cap=1e9)
    assert off_by(ours, exact) < EXACT
    assert off_by(ratio, exact) < EXACT
    cut, _, _ = off_policy(World(5, 1, ends=False), cap=1.5)
    assert off_by(cut, exact) == pytest.approx(0.8497, abs=5e-3)


def test_token_ratios_off_policy_are_the_gradient_of_the_local_objective() -> None:
    """For longer responses: pi_b's visits of s times sum_a pi(a|s) Q_b(s, a), summed (TRPO, arXiv 1502.05477, eq. 3).

    How the state was reached and what follows stay pi_b's, with truncated importance as with PPO's ratio.
    """
    world = WORLDS[0]
    ours, ratio, exact = off_policy(world, cap=1e9)
    table, behavior = world.table(0), world.table(7, scale=0.7).detach()
    chances_B, score_B = world.probabilities(behavior), centred_scores(world, behavior)
    visits = torch.zeros(len(world.states), world.vocabulary, dtype=torch.float64)
    value = torch.zeros_like(visits)
    for b, response in enumerate(world.responses):
        for t, token in enumerate(response):
            state = world.states[response[:t]]
            visits[state, token] += chances_B[b]
            value[state, token] += chances_B[b] * score_B[b]
    local = (visits.sum(1) * (table.softmax(-1) * value / visits).sum(1)).sum()
    assert off_by(ours, gradient(local, table)) < EXACT
    assert off_by(ratio, gradient(local, table)) < EXACT
    assert off_by(ours, exact) == pytest.approx(0.4836, abs=5e-3)


@pytest.mark.parametrize(("estimator", "bias"), [("k2", 0.2715), ("k3", 0.9812)])
def test_sampled_kl_estimators_are_of_the_policy_that_sampled(estimator: str, bias: float) -> None:
    """In later updates on the same samples nothing weighs them back; `full` sums over the vocabulary and stays right.

    k2 against the reverse KL at the visited states, k3 against the forward one; the samples' policy is rather far.
    """
    world = WORLDS[0]
    table, behavior, reference = world.table(0), world.table(7, scale=0.7).detach(), world.table(2).detach()
    weights_S = expected(world, behavior)
    per_state_S = (reverse_kl if estimator == "k2" else forward_kl)(table, reference)[world.states_S]
    exact = gradient((per_state_S * weights_S).sum(), table)
    ours = kl_loss(world.logprobs(table), world.logprobs(reference), weights_S, estimator=estimator)
    assert off_by(gradient(ours, table), exact) == pytest.approx(bias, abs=5e-3)


@pytest.mark.parametrize(("temperature", "bias"), [(1.0, 0.0), (0.7, 0.1729)])
def test_the_single_step_part_is_at_temperature_one(temperature: float, bias: float) -> None:
    """MiniLLM sampled at another temperature: the long part is the tempered policy's, the single-step part is not."""
    world = WORLDS[0]
    table, teacher = world.table(0), world.table(1)
    tempered = table / temperature
    reward = minillm_rewards(world.inputs(tempered, teacher), gamma=1.0, length_normalize=False, single_step=True)
    assert reward.returns_S is not None
    weights_S = expected(world, tempered)
    loss = world.surrogate(tempered, reward.returns_S, weights_S) + single_step(world, table, teacher, weights_S)
    exact = gradient(world.reverse_kl(tempered, teacher), table)
    assert off_by(gradient(loss, table), exact) == pytest.approx(bias, abs=EXACT if bias == 0 else 5e-3)
