"""Losses by hand, and however the batch is cut. Expected gradients: test_enumeration.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import ActorConfig, DataConfig, LossConfig, RunConfig
from inference.attention.packing import Group
from rewards.minillm import mixed_logprobs, mixture_importance, reverse_kl, tail_reverse_kl
from tests.support.experiences import experience_of, prompts_of, rollout_of
from training.losses import (
    NEVER,
    OutputLayer,
    PolicyTokens,
    generalized_jsd,
    kl_loss,
    policy_loss,
    sampled_cross_entropy,
    schedule_factor,
    token_weights,
    truncated_importance,
    value_loss,
)
from training.objective import LossWeights, UpdateInput, counts_of, loss_weights
from training.run.choices import check_vocabularies

ONE = LossConfig(clip_low=0.2, clip_high=0.3)


def test_token_weights_by_hand() -> None:
    lengths = torch.tensor([2, 0, 1])
    common = {"tokens": 10.0, "responses": 4.0, "constant": 5.0}
    assert token_weights(lengths, "token", **common).tolist() == pytest.approx([0.1] * 3)
    assert token_weights(lengths, "sequence", **common).tolist() == [0.125, 0.125, 0.25]
    assert token_weights(lengths, "constant", **common).tolist() == pytest.approx([0.05] * 3)


def test_denominators_count_what_is_predicted() -> None:
    """An empty response is a response; a prompt is not predicted."""
    rollout = rollout_of(prompts_of([(1, 2, 3), (4,)]), [(5, 6), (), (7, 8, 9), (5,)])
    text, cloning = [Group((1,), ((2, 3, 4),))], [Group((1, 2), ((3, 4),))]
    batch = UpdateInput(experience_of(rollout, torch.zeros(6)), text, cloning, LossWeights())
    assert counts_of(batch) == {"tokens": 6.0, "responses": 4.0, "pt": 3.0, "bc": 2.0}


def test_what_is_set_to_zero_is_off_and_a_default_asks_for_what_is_there() -> None:
    config = RunConfig(reward="minillm", loss=LossConfig(policy_coef=0.5), data=DataConfig(text=None))
    assert loss_weights(config, 0, same_tokenizer=True) == LossWeights(policy=0.5, single_step=1.0)
    off = replace(config, loss=LossConfig(single_step_coef=0.0, single_step_entries=9))
    assert loss_weights(off, 0, same_tokenizer=True) == LossWeights(policy=1.0)
    check_vocabularies(off, True, columns=9)
    with pytest.raises(ValueError, match=r"loss\.single_step_entries = 9: the teacher's vocabulary has 8"):
        check_vocabularies(off, True, columns=8)


def test_an_output_layer_by_hand() -> None:
    """Gemma 2's cap, and a column that no token has."""
    layer = OutputLayer(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), torch.tensor([False, False, True]), 3.0)
    capped = (3 * torch.tensor([1.0, 4.0]).div(3).tanh()).tolist()
    assert layer(torch.tensor([[1.0, 2.0]]))[0].tolist() == pytest.approx([*capped, NEVER])


def test_clipping_by_hand() -> None:
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    weights, response = torch.full((4,), 0.25), torch.zeros(4, dtype=torch.int64)
    loss, clipped = policy_loss(PolicyTokens(ratio.log(), torch.zeros(4), advantages, weights, response), ONE)
    # min(1.5, 1.3), min(-1.5, -1.3), min(0.5, 0.8), min(-0.5, -0.8)
    assert float(loss) == pytest.approx(-(1.3 - 1.5 + 0.5 - 0.8) / 4)
    assert clipped.tolist() == [True, False, False, True]


def test_no_gradient_flows_through_an_advantage() -> None:
    """Trap 4: a reverse-KL advantage is made of the policy's own log-probabilities, and counts as a number."""
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    response = torch.zeros(2, dtype=torch.int64)
    loss, _ = policy_loss(PolicyTokens(logprobs, logprobs.detach(), -logprobs, torch.ones(2), response), ONE)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert gradient.tolist() == [-1.0, -2.0]


def test_sequence_ratio_is_the_geometric_mean() -> None:
    log_ratio = torch.tensor([0.1, 0.3, -0.2], requires_grad=True)
    tokens = PolicyTokens(log_ratio, torch.zeros(3), torch.ones(3), torch.ones(3), torch.tensor([4, 4, 9]))
    loss, _ = policy_loss(tokens, LossConfig(clip_low=0.9, clip_high=0.9, ratio="sequence"))
    expected = 2 * torch.tensor(0.2).exp() + torch.tensor(-0.2).exp()
    assert float(loss.detach()) == pytest.approx(-float(expected))
    # A token has a share of 1 / T in the ratio of all T.
    slopes = [-float(torch.tensor(x).exp()) for x in (0.2, 0.2, -0.2)]
    assert torch.autograd.grad(loss, log_ratio)[0].tolist() == pytest.approx(slopes)
    none = PolicyTokens(*[torch.zeros(0)] * 4, torch.zeros(0, dtype=torch.int64))
    assert float(policy_loss(none, LossConfig(ratio="sequence"))[0]) == 0.0


def test_kl_estimators_by_hand() -> None:
    policy, reference, weights = torch.tensor([-1.0]), torch.tensor([-1.5]), torch.tensor([1.0])
    assert float(kl_loss(policy, reference, weights, estimator="k2")) == pytest.approx(0.125)
    k3 = float(kl_loss(policy, reference, weights, estimator="k3"))
    assert k3 == pytest.approx(torch.tensor(-0.5).exp().item() - 1 + 0.5)


def test_value_clip_by_hand() -> None:
    loss = value_loss(
        torch.tensor([2.0, 1.1]), torch.tensor([1.0, 1.0]), torch.tensor([2.0, 3.0]), torch.tensor([0.5, 0.5]), clip=0.2
    )
    # First: unclipped error 0, clipped (1.2 - 2)^2 = 0.64. Second: (1.1 - 3)^2 both ways.
    assert float(loss) == pytest.approx(0.5 * 0.5 * (0.64 + 3.61))


@pytest.mark.parametrize(("value", "old", "target", "expected", "slope"), [
    (1.1, 1.0, 2.0, 0.9**2, -0.9),  # within the clip: the plain error
    (1.5, 1.0, 2.0, 0.8**2, 0.0),  # moved too far towards the target: the clipped error, and no more pull
    (0.5, 1.0, 2.0, 1.5**2, -1.5),  # moved away: the plain error is larger, and pulls back
    (2.5, 1.0, 0.0, 2.5**2, 2.5),
    (0.0, 1.0, 0.0, 0.8**2, 0.0),  # too far the other way
])  # fmt: skip
def test_value_clip_case_by_case(value: float, old: float, target: float, expected: float, slope: float) -> None:
    values = torch.tensor([value], requires_grad=True)
    loss = value_loss(values, torch.tensor([old]), torch.tensor([target]), torch.ones(1), clip=0.2)
    assert float(loss.detach()) == pytest.approx(0.5 * expected)
    assert torch.autograd.grad(loss, values)[0].item() == pytest.approx(slope, abs=1e-6)


def test_importance_weights_by_hand() -> None:
    behavior, sampled = torch.tensor([0.5, 0.25, 0.5]).log(), torch.tensor([0.25, 0.5, 0.8]).log()
    lengths = torch.tensor([2, 1])
    assert mixture_importance(behavior, sampled, lengths, by="token").tolist() == pytest.approx([2.0, 0.5, 0.625])
    assert mixture_importance(behavior, sampled, lengths, by="sequence").tolist() == pytest.approx([1.0, 1.0, 0.625])
    assert truncated_importance(behavior[:2], sampled[:2], 1.5).tolist() == pytest.approx([1.5, 0.5])


@pytest.mark.parametrize("padded", [0, 2])
def test_a_mixture_by_hand(padded: int) -> None:
    """A teacher of another width shares its first entries."""
    policy, teacher = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.1, 0.9, 0.0, 0.0][: 2 + padded]])
    mixed = mixed_logprobs(policy.log(), teacher.log(), 0.25).exp()
    assert mixed[0].tolist() == pytest.approx([0.375 + 0.025, 0.225 + 0.225, 0.15])


def test_divergences_by_hand() -> None:
    policy, teacher = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.5, 0.25]]).log()
    log2 = torch.tensor(2.0).log().item()
    assert float(reverse_kl(policy, teacher)) == pytest.approx(0.25 * log2)
    # m = 3/8 3/8 1/4: half of each KL to it, which are alike.
    m = torch.tensor([0.375, 0.375, 0.25])
    half = float((policy[0].exp() * (policy[0] - m.log())).sum())
    assert float(generalized_jsd(policy, teacher, 0.5)) == pytest.approx(half)
    ids = torch.tensor([[0, 2]])
    known = teacher.gather(-1, ids)
    # Targets 1/2 1/2 after renormalising; the student's 1/2 and 1/4 are not renormalised.
    assert float(sampled_cross_entropy(policy, ids, known)) == pytest.approx(1.5 * log2)
    # Kept: .5 log 2 + 0; the tail has .25 against .5.
    assert float(tail_reverse_kl(policy, ids, known)) == pytest.approx(0.5 * log2 - 0.25 * log2)


def test_schedules_by_hand() -> None:
    def factors(kind: str) -> list[float]:
        return [schedule_factor(step, kind=kind, final=0.2, total=4) for step in (0, 1, 2, 4, 9)]

    assert factors("constant") == [1.0] * 5
    assert factors("linear") == pytest.approx([1.0, 0.8, 0.6, 0.2, 0.2])
    assert factors("cosine") == pytest.approx([1.0, 0.2 + 0.4 * (1 + 0.5**0.5), 0.6, 0.2, 0.2])


def test_the_learning_rate_by_hand() -> None:
    from training.student.deepspeed_engine import Optimisation, learning_rate  # DeepSpeed, which nothing else needs

    def rates(schedule: str) -> list[float]:
        config = ActorConfig(warmup_steps=2, schedule=schedule)  # type: ignore[arg-type]
        options = Optimisation(0.1, total_steps=6, zero_stage=0, dtype="float32")
        return [learning_rate(step, config, options) for step in (0, 1, 2, 3, 6, 9)]

    assert rates("constant") == pytest.approx([0.05, 0.1, 0.1, 0.1, 0.1, 0.1])
    assert rates("linear") == pytest.approx([0.05, 0.1, 0.1, 0.075, 0.0, 0.0])
    assert rates("cosine") == pytest.approx([0.05, 0.1, 0.1, 0.05 * (1 + 0.5**0.5), 0.0, 0.0])


def test_reverse_kl_is_exact_and_not_negative() -> None:
    policy, teacher = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.2, 0.5, 0.3]])
    expected = sum(p * (p / q).log() for p, q in zip(policy[0], teacher[0], strict=True))
    assert float(reverse_kl(policy.log(), teacher.log() + 3.0)) == pytest.approx(float(expected), abs=1e-6)
    assert float(reverse_kl(policy.log(), policy.log())) == pytest.approx(0.0, abs=1e-7)


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=6), st.sampled_from(["token", "sequence", "constant"]), st.data()
)
def test_cutting_the_batch_changes_nothing(lengths: list[int], aggregation: str, data: st.DataObject) -> None:
    """Trap 22: micro-batches and ranks add up to the whole."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    policy, behavior, advantages = torch.randn(3, sum(lengths), generator=generator)
    counts = {"tokens": float(sum(lengths)), "responses": float(len(lengths)), "constant": 5.0}
    response = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))

    def loss_of(first: int, last: int) -> float:
        at = (response >= first) & (response < last)
        weights = token_weights(torch.tensor(lengths[first:last], dtype=torch.int64), aggregation, **counts)
        tokens = PolicyTokens(policy[at], behavior[at], advantages[at], weights, response[at])
        return float(policy_loss(tokens, ONE)[0])

    cut, end = data.draw(st.integers(0, len(lengths))), len(lengths)
    assert loss_of(0, cut) + loss_of(cut, end) == pytest.approx(loss_of(0, end), abs=1e-5)
