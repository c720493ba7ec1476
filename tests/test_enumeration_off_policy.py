"""Expected gradients with samples that are not the policy's own: mixed with the teacher's, or another policy's.

Over all responses, in float64, as in test_enumeration.py; `off_by` is a bias as a share of the exact gradient.
"""

from __future__ import annotations

import pytest
import torch

from rewards.minillm import minillm_rewards
from tests.enumeration import World, centred_scores, expected, gradient, off_by, single_step
from training.losses import mixture_importance, truncated_importance

WORLDS = [World(3, 4), World(4, 3), World(5, 3), World(3, 3, ends=False)]
EXACT = 1e-9


def mixed(world: World, by: str, *, minillm: bool, share: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """Expected gradient with samples of the mixture, and the exact one: of the score, or of the reverse KL."""
    table, teacher = world.table(0), world.table(1)
    mixture = torch.logsumexp(torch.stack([
        teacher.detach().log_softmax(-1) + torch.tensor(share).log(),
        table.detach().log_softmax(-1) + torch.tensor(1 - share).log(),
    ]), 0)  # fmt: skip
    behavior_BR, sampled_BR = world.logprobs(table).detach(), world.logprobs(mixture)
    importance_BR = mixture_importance(behavior_BR, sampled_BR, world.lengths_B, by=by)
    weights_BR = expected(world, table, drawn_from=sampled_BR.sum(1).exp())
    if not minillm:
        score_B = centred_scores(world, table)
        exact = gradient((world.probabilities(table) * score_B).sum(), table)
        credit_BR = score_B[:, None].expand_as(behavior_BR)
        return -gradient(world.surrogate(table, credit_BR, weights_BR, importance_BR=importance_BR), table), exact
    reward = minillm_rewards(world.inputs(table, teacher), gamma=1.0, length_normalize=False, single_step=True)
    assert reward.returns_BR is not None
    loss = world.surrogate(table, reward.returns_BR, weights_BR, importance_BR=importance_BR)
    loss = loss + single_step(world, table, teacher, weights_BR * importance_BR)
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


def off_policy(world: World, cap: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Samples of pi_b, trained at pi: gradient by truncated importance, by the policy ratio, and the exact one."""
    table, behavior = world.table(0), world.table(7, scale=0.7).detach()
    score_BR = centred_scores(world, behavior)[:, None].expand(-1, world.longest)
    weights_BR = expected(world, behavior)
    importance_BR = truncated_importance(world.logprobs(table), world.logprobs(behavior), cap)
    assert not importance_BR.requires_grad
    ours = -gradient(world.surrogate(table, score_BR, weights_BR, importance_BR=importance_BR), table)
    ratio = -gradient(world.surrogate(table, score_BR, weights_BR, behavior=behavior), table)
    return ours, ratio, gradient((world.probabilities(table) * score_BR[:, 0]).sum(), table)


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
