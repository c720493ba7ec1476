"""From log-probabilities to the gradient, whatever the cut into micro-batches and the order.

One chain of the product's functions (rewards, advantages, weights, every loss term) is run on a random batch, and then
on the same batch laid out differently: loss and gradient must not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import GRPOConfig, LossConfig, RewardConfig, RunConfig
from rewards import REWARDS
from rewards.base import RewardInput
from rewards.lpt_reward import lpt_loss
from rewards.minillm import mean_return, mixture_importance, reverse_kl, tail_reverse_kl
from rewards.tokens import response_of_token
from tests.support.experiences import experience_of, prompts_of, rollout_of
from training.advantages import gae
from training.algorithms import ALGORITHMS
from training.experience import Rewarded
from training.losses import (
    PolicyTokens,
    generalized_jsd,
    kl_loss,
    policy_loss,
    sampled_cross_entropy,
    token_weights,
    truncated_importance,
    value_loss,
)

GROUP, VOCABULARY = 2, 4


@dataclass(frozen=True)
class Choices:
    """Settings of a run."""

    algo: str
    reward: str
    aggregation: str
    ratio: str
    scale: str
    baseline: str
    importance: str


@dataclass(frozen=True)
class Batch:
    """B responses in groups of two, S tokens; float64."""

    lengths_B: torch.Tensor
    behavior_S: torch.Tensor
    sampled_S: torch.Tensor
    teacher_S: torch.Tensor
    reference_S: torch.Tensor
    values_S: torch.Tensor
    policy_SV: torch.Tensor
    teacher_SV: torch.Tensor

    def rows(self, rows: Sequence[int]) -> Batch:
        """Some of the responses, in this order."""
        at = self.places(rows)
        tokens = {name: value[at] for name, value in vars(self).items() if name != "lengths_B"}
        return Batch(lengths_B=self.lengths_B[list(rows)], **tokens)

    def places(self, rows: Sequence[int]) -> list[int]:
        ends = self.lengths_B.cumsum(0).tolist()
        return [s for b in rows for s in range(ends[b] - int(self.lengths_B[b]), ends[b])]


def make_batch(lengths: Sequence[int], seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def noise(*more: int) -> torch.Tensor:
        return torch.randn(sum(lengths), *more, generator=generator, dtype=torch.float64)

    behavior_S = -noise().abs()
    return Batch(
        lengths_B=torch.tensor(lengths),
        behavior_S=behavior_S,
        sampled_S=behavior_S + 0.2 * noise(),
        teacher_S=-noise().abs(),
        reference_S=behavior_S + 0.3 * noise(),
        values_S=noise(),
        policy_SV=noise(VOCABULARY),
        teacher_SV=noise(VOCABULARY),
    )


def advantages(batch: Batch, choices: Choices) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages, what the critic is trained towards) [S] of whole groups."""
    count = len(batch.lengths_B)
    inputs = RewardInput(
        lengths_B=batch.lengths_B,
        finished_B=torch.ones(count, dtype=torch.bool),
        behavior_logprobs_S=batch.behavior_S,
        teacher_logprobs_S=batch.teacher_S,
        texts_B=[""] * count,
        answers_B=[()] * count,
    )
    config = RunConfig(
        rewards=RewardConfig(gamma=0.9),
        grpo=GRPOConfig(scale=choices.scale, baseline=choices.baseline, epsilon=1e-4),  # type: ignore[arg-type]
    )
    reward = REWARDS[choices.reward].reward(inputs, config.rewards, True)
    prompts = prompts_of([(0,)] * (count // GROUP))
    responses = [(1,) * length for length in batch.lengths_B.tolist()]
    scored = experience_of(
        rollout_of(prompts, responses, batch.behavior_S),
        batch.behavior_S,
        reference_logprobs_S=batch.reference_S,
        values_S=batch.values_S,
    ).scored
    made = {name: row.advantages(Rewarded(scored, reward), config, 0.1) for name, row in ALGORITHMS.items()}
    targets_S = made["ppo"][1]
    assert targets_S is not None
    return made[choices.algo][0], targets_S


def counts_of(batch: Batch) -> dict[str, float]:
    """Denominators of the whole batch."""
    return {"tokens": float(batch.lengths_B.sum()), "responses": float(len(batch.lengths_B)), "constant": 5.0}


def terms(
    batch: Batch, advantages_S: torch.Tensor, targets_S: torch.Tensor, counts: dict[str, float], choices: Choices
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every loss term of (part of) a batch [terms], and the gradient of their sum by the policy's logits [S, V]."""
    weights_S = token_weights(batch.lengths_B, choices.aggregation, **counts)
    logits_SV, teacher_SV = batch.policy_SV.detach().requires_grad_(), batch.teacher_SV
    logprobs_S = logits_SV.log_softmax(-1)[:, 0]
    mixed_S = mixture_importance(batch.behavior_S, batch.sampled_S, batch.lengths_B, by=choices.importance)
    tokens = PolicyTokens(
        policy_logprobs_S=logprobs_S,
        old_logprobs_S=batch.behavior_S,
        advantages_S=advantages_S,
        weights_S=weights_S * mixed_S * truncated_importance(logprobs_S, batch.behavior_S, 2.0),
        response_S=response_of_token(batch.lengths_B) * 3 + 7,
    )
    loss = LossConfig(clip_low=0.2, clip_high=0.3, ratio=choices.ratio)  # type: ignore[arg-type]
    teacher_logprobs_SK, ids_SK = teacher_SV.log_softmax(-1).topk(2, -1)
    out = torch.stack([
        policy_loss(tokens, loss)[0],
        kl_loss(logprobs_S, batch.reference_S, weights_S, estimator="k2"),
        kl_loss(logprobs_S, batch.reference_S, weights_S, estimator="k3"),
        value_loss(batch.values_S + logprobs_S, batch.values_S, targets_S, weights_S, clip=0.2),
        lpt_loss(logprobs_S, max(counts["tokens"], 1.0)),
        (reverse_kl(logits_SV, teacher_SV) * weights_S).sum(),
        (generalized_jsd(logits_SV, teacher_SV, 0.3) * weights_S).sum(),
        (sampled_cross_entropy(logits_SV, ids_SK, teacher_logprobs_SK) * weights_S).sum(),
        (tail_reverse_kl(logits_SV, ids_SK, teacher_logprobs_SK) * weights_S).sum(),
    ])  # fmt: skip
    (gradient_SV,) = torch.autograd.grad(out.sum(), logits_SV)
    return out.detach(), gradient_SV


def whole(batch: Batch, choices: Choices) -> tuple[torch.Tensor, torch.Tensor]:
    """Terms and gradient of the batch in one piece."""
    return terms(batch, *advantages(batch, choices), counts_of(batch), choices)


settings_of_a_run = st.builds(
    Choices,
    algo=st.sampled_from(["grpo", "ppo"]),
    reward=st.sampled_from(["minillm", "teacher_logprob"]),
    aggregation=st.sampled_from(["token", "sequence", "constant"]),
    ratio=st.sampled_from(["token", "sequence"]),
    scale=st.sampled_from(["group", "batch", "none"]),
    baseline=st.sampled_from(["mean", "leave_one_out"]),
    importance=st.sampled_from(["token", "sequence"]),
)
batches = st.builds(
    make_batch,
    lengths=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), min_size=1, max_size=4).map(
        lambda pairs: [length for pair in pairs for length in pair]
    ),
    seed=st.integers(0, 10**6),
)
some = settings(max_examples=40)


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-9, atol=1e-9)


@some
@given(batches, settings_of_a_run, st.data())
def test_the_cut_into_micro_batches_changes_nothing(batch: Batch, choices: Choices, data: st.DataObject) -> None:
    """Trap 22: sums of parts, each with the whole batch's denominators; a part is whole responses."""
    rows = list(range(len(batch.lengths_B)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=3)))
    made = advantages(batch, choices)
    values, gradient = whole(batch, choices)
    parts = [rows[start:end] for start, end in zip([0, *cuts], [*cuts, len(rows)], strict=True)]
    total, gradients = torch.zeros_like(values), []
    for part in parts:
        at = batch.places(part)
        if not at:
            continue
        piece, piece_gradient = terms(batch.rows(part), made[0][at], made[1][at], counts_of(batch), choices)
        total, gradients = total + piece, [*gradients, piece_gradient]
    assert close(total, values)
    assert close(torch.cat(gradients), gradient)


@some
@given(batches, settings_of_a_run, st.randoms(use_true_random=False))
def test_the_order_of_responses_changes_nothing(batch: Batch, choices: Choices, random: st.DataObject) -> None:
    """Groups in another order, and the members of each."""
    groups = list(range(len(batch.lengths_B) // GROUP))
    random.shuffle(groups)  # type: ignore[attr-defined]
    rows = []
    for group in groups:
        members = [group * GROUP + i for i in range(GROUP)]
        random.shuffle(members)  # type: ignore[attr-defined]
        rows += members
    values, gradient = whole(batch, choices)
    other_values, other_gradient = whole(batch.rows(rows), choices)
    assert close(values, other_values)
    assert close(gradient[batch.places(rows)], other_gradient)


@some
@given(batches, settings_of_a_run)
def test_another_groups_rewards_change_nothing_in_this_group(batch: Batch, choices: Choices) -> None:
    """Without `scale: batch` and whitening, a group's advantages are its own."""
    choices = replace(choices, algo="grpo", scale="group" if choices.scale == "batch" else choices.scale)
    first = list(range(GROUP))
    alone, _ = advantages(batch.rows(first), choices)
    together, _ = advantages(batch, choices)
    assert close(alone, together[: len(alone)])


@some
@given(batches, st.floats(0, 1), st.floats(0, 1), st.booleans(), st.sampled_from([0, 1]))
def test_returns_and_advantages_are_the_sums_that_define_them(
    batch: Batch, gamma: float, lam: float, normalize: bool, first: int
) -> None:
    """`mean_return` and `gae` run backwards over the tokens; here each entry is its own sum."""
    lengths = batch.lengths_B.tolist()
    returns = mean_return(batch.teacher_S, batch.lengths_B, gamma=gamma, normalize=normalize, first=first)
    both = gae(batch.teacher_S, batch.values_S, batch.lengths_B, gamma=gamma, lam=lam)
    made = zip(*(v.split(lengths) for v in (batch.teacher_S, batch.values_S, returns, *both)), strict=True)
    for length, (rewards_R, values_R, returns_R, advantages_R, targets_R) in zip(lengths, made, strict=True):
        rewards, values = rewards_R.tolist(), [*values_R.tolist(), 0.0]
        for t in range(length):
            powers = [gamma ** (k - t - first) for k in range(t + first, length)]
            total = sum(power * rewards[t + first + i] for i, power in enumerate(powers))
            expected = total / sum(powers) if normalize and powers else total
            assert abs(float(returns_R[t]) - expected) < 1e-9
            deltas = [rewards[k] + gamma * values[k + 1] - values[k] for k in range(t, length)]
            expected = sum((gamma * lam) ** i * delta for i, delta in enumerate(deltas))
            assert abs(float(advantages_R[t]) - expected) < 1e-9
            assert abs(float(targets_R[t]) - expected - values[t]) < 1e-9
