"""Divergences between two distributions, and their estimators from samples, against sums over everything."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from rewards.minillm import reverse_kl, tail_reverse_kl
from tests.support.enumeration import World, cosine, gradient, off_by
from training.advantages import quantile_rewards
from training.losses import (
    OutputLayer,
    WholeDistribution,
    forward_kl,
    generalized_jsd,
    jsd_term,
    kl_loss,
    reverse_kl_term,
    sampled_ce_term,
    sampled_cross_entropy,
    tail_kl_term,
)
from training.student.token_logprobs import TERM_ROWS, RowTerm

WORLDS = [World(3, 4), World(4, 3), World(5, 3), World(3, 3, ends=False)]
EXACT = 1e-9


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole(table: torch.Tensor) -> WholeDistribution:
    return WholeDistribution(table, OutputLayer(torch.eye(table.shape[1], dtype=torch.float64)))


def estimated(world: World, table: torch.Tensor, reference: torch.Tensor, estimator: str) -> torch.Tensor:
    """Expectation over the policy's own responses of the product's KL loss, summed over tokens."""
    chances_S = world.each(world.probabilities(table).detach())
    return kl_loss(world.logprobs(table), world.logprobs(reference), chances_S, estimator=estimator)


@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_the_gradient_of_each_kl_estimator(world: World) -> None:
    """Trap 13. With visited states held fixed: k2's is that of the reverse KL, k3's of the forward KL, k1's is nil."""
    table, reference = world.table(0), world.table(2)
    exact_reverse = gradient(world.per_state(table, lambda x: reverse_kl(x, reference)), table)
    exact_forward = gradient(world.per_state(table, lambda x: forward_kl(x, reference)), table)
    assert off_by(gradient(estimated(world, table, reference, "k2"), table), exact_reverse) < EXACT
    assert off_by(gradient(estimated(world, table, reference, "k3"), table), exact_forward) < EXACT
    assert off_by(exact_reverse, exact_forward) > 0.1  # they are not the same
    full = reverse_kl_term(whole(reference))
    got = gradient(world.per_state(table, lambda x: full(x, slice(0, len(x)))), table)
    assert off_by(got, exact_reverse) < EXACT
    # k1, which the product refuses, written out.
    chances_B = world.probabilities(table).detach()
    k1 = (chances_B * world.total(world.logprobs(table) - world.logprobs(reference))).sum()
    assert float(gradient(k1, table).norm() / exact_reverse.norm()) < EXACT


@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_the_value_of_each_kl_estimator(world: World) -> None:
    """k3 and full are the KL of whole responses in expectation; k2 is near it only where the two are near."""
    table, reference = world.table(0).detach(), world.table(2).detach()
    exact = float(world.reverse_kl(table, reference))
    assert float(estimated(world, table, reference, "k3")) == pytest.approx(exact, rel=1e-9)
    assert float(world.per_state(table, lambda x: reverse_kl(x, reference))) == pytest.approx(exact, rel=1e-9)
    assert abs(float(estimated(world, table, reference, "k2")) / exact - 1) > 0.05
    near = (table + 0.02 * reference).detach()
    assert float(estimated(world, table, near, "k2")) == pytest.approx(float(world.reverse_kl(table, near)), rel=0.02)


def test_what_a_kl_in_the_loss_leaves_out() -> None:
    """How the policy's choices change which states are visited; PPO's penalty in the reward has that part."""
    world = WORLDS[0]
    table, reference = world.table(0), world.table(2)
    exact = gradient(world.reverse_kl(table, reference), table)
    ours = gradient(world.per_state(table, lambda x: reverse_kl(x, reference)), table)
    assert off_by(ours, exact) == pytest.approx(0.4367, abs=5e-3)
    assert cosine(ours, exact) == pytest.approx(0.9557, abs=5e-3)
    one_token = World(5, 1, ends=False)
    table, reference = one_token.table(0), one_token.table(2)
    exact = gradient(one_token.reverse_kl(table, reference), table)
    assert off_by(gradient(one_token.per_state(table, lambda x: reverse_kl(x, reference)), table), exact) < EXACT


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_generalized_jsd(beta: float) -> None:
    """GKD (arXiv 2306.13649, eq. 1), term by term in probabilities; never above the entropy of the coin beta."""
    policy, teacher = 2 * logits(6, 5), 2 * logits(6, 5, seed=1)
    p, q = teacher.softmax(-1), policy.softmax(-1)
    m = beta * p + (1 - beta) * q
    expected = beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)
    got = jsd_term(whole(teacher), beta)(policy, slice(0, 6))
    assert torch.allclose(got, expected, atol=1e-12)
    assert torch.allclose(got, generalized_jsd(teacher, policy, 1 - beta), atol=1e-12)  # roles and beta swap together
    assert bool((got < -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)).all())
    assert torch.autograd.gradcheck(lambda x: generalized_jsd(x, teacher, beta), policy.requires_grad_())


def test_the_ends_of_generalized_jsd() -> None:
    """Divided by beta (by 1 - beta) it goes to the forward (reverse) KL, which stand for the ends themselves."""
    policy, teacher = logits(6, 5), logits(6, 5, seed=1)
    small = 1e-6
    assert torch.allclose(generalized_jsd(policy, teacher, small) / small, forward_kl(policy, teacher), atol=1e-5)
    assert torch.allclose(generalized_jsd(policy, teacher, 1 - small) / small, reverse_kl(policy, teacher), atol=1e-5)
    assert torch.equal(generalized_jsd(policy, teacher, 0.0), forward_kl(policy, teacher))
    assert torch.equal(generalized_jsd(policy, teacher, 1.0), reverse_kl(policy, teacher))


def test_sampled_cross_entropy_of_all_tokens_has_the_forward_kls_gradient() -> None:
    policy, teacher = logits(6, 5).requires_grad_(), logits(6, 5, seed=1)
    ids = torch.stack([torch.randperm(5, generator=torch.Generator().manual_seed(i)) for i in range(6)])
    loss = sampled_cross_entropy(policy, ids, teacher.log_softmax(-1).gather(-1, ids))
    entropy = -(teacher.softmax(-1) * teacher.log_softmax(-1)).sum(-1)
    assert torch.allclose(loss - entropy, forward_kl(policy, teacher), atol=1e-12)
    assert off_by(gradient(loss.sum(), policy), gradient(forward_kl(policy, teacher).sum(), policy)) < EXACT
    term = sampled_ce_term(whole(teacher), count=256, seed=3)  # more than the vocabulary has
    assert torch.allclose(term(policy, slice(0, 6)), loss, atol=1e-12)


def subsets(logprobs: torch.Tensor, count: int) -> dict[tuple[int, ...], float]:
    """Probability of each ordered draw of `count` tokens without replacement."""
    chances = logprobs.exp().tolist()
    found = {}
    for order in itertools.permutations(range(len(chances)), count):
        probability, left = 1.0, 1.0
        for token in order:
            probability *= chances[token] / left
            left -= chances[token]
        found[order] = probability
    return found


@pytest.mark.parametrize(("count", "bias"), [(1, 0.0), (2, 0.2927), (3, 0.2671), (4, 0.1347)])
def test_fewer_sampled_tokens_flatten_the_target(count: int, bias: float) -> None:
    """Gemma 3's renormalisation: one token is unbiased, all are exact, and between them likely tokens count less."""
    policy, teacher = logits(1, 5).requires_grad_(), 2 * logits(1, 5, seed=1)
    logprobs = teacher.log_softmax(-1)
    loss = torch.zeros((), dtype=torch.float64)
    for order, chance in subsets(logprobs[0], count).items():
        ids = torch.tensor([order])
        loss = loss + chance * sampled_cross_entropy(policy, ids, logprobs.gather(-1, ids)).sum()
    exact = gradient(forward_kl(policy, teacher).sum(), policy)
    assert off_by(gradient(loss, policy), exact) == pytest.approx(bias, abs=EXACT if bias == 0 else 5e-3)


def test_tokens_are_sampled_without_replacement_from_the_teacher() -> None:
    """Which pairs the term draws, by the two entries that its loss rises with: frequencies against the exact ones."""
    rows = 20_000
    teacher = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).log()
    policy = torch.zeros(rows, 4, dtype=torch.float64, requires_grad=True)
    term = sampled_ce_term(whole(teacher.expand(rows, 4)), count=2, seed=11)
    drawn = (torch.autograd.grad(term(policy, slice(0, rows)).sum(), policy)[0] - 0.25).abs() > 1e-9
    assert drawn.sum(1).eq(2).all()
    for pair in itertools.combinations(range(4), 2):
        exact = sum(chance for order, chance in subsets(teacher, 2).items() if set(order) == set(pair))
        assert float(drawn[:, list(pair)].all(1).double().mean()) == pytest.approx(exact, abs=0.015)
    again = torch.autograd.grad(term(policy, slice(0, rows)).sum(), policy)[0]
    assert torch.equal((again - 0.25).abs() > 1e-9, drawn)  # a recomputed chunk draws the same

    def one_each(seed: int, start: int) -> torch.Tensor:
        of = sampled_ce_term(whole(teacher.expand(40, 4)), count=1, seed=seed)
        return of(torch.arange(80.0).view(20, 4), slice(start, start + 20))

    assert not torch.equal(one_each(1, 0), one_each(2, 0)), "another row draws others"
    assert not torch.equal(one_each(1, 0), one_each(1, 20)), "and so does the next chunk"


@pytest.mark.parametrize("kept", [1, 2, 4, 5])
def test_the_kl_with_a_tail_is_a_lower_bound(kept: int) -> None:
    """Trap 12: never negative, exact where all entries are kept, and right in its gradient."""
    policy, teacher = 3 * logits(50, 5), (3 * logits(50, 5, seed=1)).log_softmax(-1)
    values, ids = teacher.topk(kept, -1)
    got = tail_kl_term(ids, values)(policy, slice(0, 50))
    exact = reverse_kl(policy, teacher)
    p, q = policy.softmax(-1), teacher.exp()
    rest, teacher_rest = 1 - p.gather(-1, ids).sum(-1), 1 - q.gather(-1, ids).sum(-1)
    expected = (p.gather(-1, ids) * (p.gather(-1, ids).log() - values)).sum(-1)
    if kept < 5:
        expected = expected + rest * (rest / teacher_rest).log()
    assert torch.allclose(got, expected, atol=1e-9)
    assert bool((got > 0).all())
    assert bool((got <= exact + 1e-9).all())
    assert torch.allclose(got, exact, atol=1e-9) == (kept >= 4)  # a tail of one entry is that entry
    few = policy[:4].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tail_reverse_kl(x, ids[:4], values[:4]), few)


def test_the_tail_keeps_the_support() -> None:
    """Trap 12: a policy with all its mass outside the kept entries is pulled back, and harder the farther it is."""
    teacher = torch.tensor([[0.6, 0.3, 0.06, 0.04]], dtype=torch.float64).log()
    values, ids = teacher.topk(2, -1)
    policy = torch.tensor([[0.0, 0.0, 5.0, 5.0]], dtype=torch.float64, requires_grad=True)
    loss = tail_reverse_kl(policy, ids, values)
    (slope,) = torch.autograd.grad(loss.sum(), policy)
    assert float(loss) > 2.0
    assert float(slope[0, 2]) > 0 > float(slope[0, 0])
    # Without the tail the sum over kept entries is negative here, and clamping it at zero would stop all learning.
    kept = policy.softmax(-1)[:, :2]
    assert float((kept * (kept.log() - values)).sum()) < 0


def test_an_entry_that_only_the_teacher_has_is_one_that_the_policy_gives_nothing() -> None:
    """A teacher that is padded further may name one among its likeliest."""
    policy = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log().requires_grad_()
    teacher = torch.tensor([[0.25, 0.1, 0.25, 0.4]], dtype=torch.float64).log()
    values, ids = teacher.topk(2, -1)
    assert ids.tolist()[0][0] == 3
    kept, rest = (0.5, 0.5) if ids[0, 1] == 0 else (0.25, 0.75)
    loss = tail_reverse_kl(policy, ids, values)
    assert float(loss) == pytest.approx(kept * math.log(kept / 0.25) + rest * math.log(rest / 0.35))
    assert torch.isfinite(torch.autograd.grad(loss.sum(), policy)[0]).all()


def test_a_tail_that_rounds_to_nothing_stays_finite() -> None:
    policy = torch.zeros(1, 4, requires_grad=True)
    teacher = torch.tensor([[60.0, 0.0, 0.0, 0.0]]).log_softmax(-1)
    loss = tail_reverse_kl(policy, torch.tensor([[0]]), teacher[:, :1])
    assert torch.isfinite(loss).all()
    assert torch.isfinite(torch.autograd.grad(loss.sum(), policy)[0]).all()
    assert float(loss) < float(reverse_kl(policy, teacher))


def best_of(chances: torch.Tensor, at_most: torch.Tensor, below: torch.Tensor, count: int) -> torch.Tensor:
    """Probability that each response is the best of `count` draws, ties broken by chance."""
    ties = at_most - below
    return chances / ties * (at_most**count - below**count)


@pytest.mark.parametrize("count", [2, 4, 16])
def test_the_best_of_n_maximises_bonds_objective(count: int) -> None:
    """BOND (arXiv 2407.14622, theorem 1), on all responses, with exact quantiles.

    E[r] - KL(pi || pi_ref) / (N - 1) is largest at pi_ref exp((N - 1) r). With r = log p_<= plus the paper's correction
    for ties that is the distribution of the best of N; without it, as here and in the paper's practice, nearly.
    """
    world = World(4, 3)
    reference_B = world.probabilities(world.table(2)).detach()
    score_B = world.total(world.logprobs(world.table(1))).detach()
    at_most_B = torch.stack([reference_B[score_B <= s].sum() for s in score_B])
    below_B = torch.stack([reference_B[score_B < s].sum() for s in score_B])
    best_B = best_of(reference_B, at_most_B, below_B, count)
    assert float(best_B.sum()) == pytest.approx(1.0)

    reward_B = at_most_B.log()
    ratio_B = below_B / at_most_B
    ties_B = sum(ratio_B**i for i in range(count)).log() / (count - 1)  # type: ignore[union-attr]
    corrected = (reference_B.log() + (count - 1) * (reward_B + ties_B)).softmax(0)
    assert torch.allclose(corrected, best_B, atol=1e-12)

    optimum = (reference_B.log() + (count - 1) * reward_B).softmax(0)
    distance = 0.5 * float((optimum - best_B).abs().sum())
    assert distance == pytest.approx({2: 0.0456, 4: 0.0428, 16: 0.0598}[count], abs=1e-3)

    def objective(chances: torch.Tensor) -> torch.Tensor:
        kl = (chances * (chances.log() - reference_B.log())).sum()
        return (chances * reward_B).sum() - kl / (count - 1)

    for other in (best_B, reference_B, 0.9 * optimum + 0.1 * reference_B):
        assert float(objective(optimum)) > float(objective(other))


def test_quantile_rewards_by_hand_and_in_the_limit() -> None:
    got = quantile_rewards(torch.tensor([1.0, 3.0, 3.0, 2.0, 5.0, 5.0, 5.0, 5.0]), 4)
    assert got.exp().tolist() == pytest.approx([0.25, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 1.0])
    drawn = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # Uniform scores are their own quantiles.
    assert float((quantile_rewards(drawn, 4000).exp() - drawn).abs().max()) < 0.03


@pytest.mark.parametrize("count", [0, 5])
def test_a_term_of_a_recomputed_chunk_is_called_as_often_whatever_its_rows(count: int) -> None:
    """Each call may be a collective, so that one more or less on a rank is a hang: once in the forward pass and once
    in the backward pass for each part, also where there are no rows."""
    calls = []

    def term(logits: torch.Tensor, piece: slice) -> torch.Tensor:
        calls.append(piece)
        return logits.square().exp().sum(-1)

    def chunk(hidden: torch.Tensor) -> torch.Tensor:
        return RowTerm.apply(hidden.sin(), term, slice(0, count), 2)

    hidden = torch.randn(count, 7, requires_grad=True)
    out = checkpoint(chunk, hidden, use_reentrant=False)
    assert len(calls) == 2
    out.sum().backward()
    assert len(calls) == 4
    assert calls[:2] == calls[2:]


@pytest.mark.parametrize("count", [0, 1, TERM_ROWS, 2 * TERM_ROWS + 3])
def test_a_few_rows_at_a_time_give_the_values_and_gradients_of_all_at_once(count: int) -> None:
    logits = torch.randn(count, 20, requires_grad=True)
    teacher = WholeDistribution(torch.randn(count + 2, 6), OutputLayer(torch.randn(20, 6)))
    entries = torch.randn(count + 2, 20).log_softmax(-1).topk(4, -1)
    weights, piece = torch.randn(count), slice(2, count + 2)
    for term in (jsd_term(teacher, 0.3), reverse_kl_term(teacher), tail_kl_term(entries.indices, entries.values)):
        expected = term(logits, piece)
        (wanted,) = torch.autograd.grad((expected * weights).sum(), logits)
        found = RowTerm.apply(logits, term, piece, 3)
        (gradient,) = torch.autograd.grad((found * weights).sum(), logits)
        torch.testing.assert_close(found, expected.detach(), check_dtype=False)
        torch.testing.assert_close(gradient, wanted)
        with torch.no_grad():
            torch.testing.assert_close(RowTerm.apply(logits, term, piece, 3), expected.detach())
