"""From log-probabilities to the gradient, whatever the padding, the cut into micro-batches and the order.

One chain of the product's functions (rewards, advantages, weights, every loss term) is run on a random batch, and then
on the same batch laid out differently: loss and gradient must not change. Padding holds NaN: nothing may touch it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.schema import GRPOConfig, PPOConfig
from rewards.base import RewardInput, length_mask
from rewards.lpt_reward import lpt_loss
from rewards.minillm import mean_return, minillm_rewards
from rewards.teacher_logprob import teacher_logprob_rewards
from training.advantages import gae
from training.grpo import grpo_advantages
from training.losses import (
    generalized_jsd,
    kl_loss,
    mixture_importance,
    policy_loss,
    reverse_kl,
    sampled_cross_entropy,
    tail_reverse_kl,
    token_weights,
    truncated_importance,
    value_loss,
)
from training.ppo import ppo_advantages

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
    """B responses in groups of two; float64, NaN on padding. The last axis of logits is the vocabulary."""

    lengths_B: torch.Tensor
    behavior_BR: torch.Tensor
    sampled_BR: torch.Tensor
    teacher_BR: torch.Tensor
    reference_BR: torch.Tensor
    values_BR: torch.Tensor
    policy_BRV: torch.Tensor
    teacher_BRV: torch.Tensor

    def rows(self, rows: Sequence[int]) -> Batch:
        return Batch(**{name: value[list(rows)] for name, value in vars(self).items()})

    def padded(self, columns: int) -> Batch:
        def wider(value: torch.Tensor) -> torch.Tensor:
            if value.dim() == 1:
                return value
            return torch.cat([value, value.new_full((value.shape[0], columns, *value.shape[2:]), torch.nan)], 1)

        return Batch(**{name: wider(value) for name, value in vars(self).items()})

    @property
    def mask_BR(self) -> torch.Tensor:
        return length_mask(self.lengths_B, self.behavior_BR.shape[1])


def make_batch(lengths: Sequence[int], seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    lengths_B, width = torch.tensor(lengths), max(*lengths, 1)
    mask_BR = length_mask(lengths_B, width)

    def noise(*more: int) -> torch.Tensor:
        value = torch.randn(len(lengths), width, *more, generator=generator, dtype=torch.float64)
        return torch.where(mask_BR.view(*mask_BR.shape, *[1] * len(more)), value, torch.nan)

    behavior_BR = -noise().abs()
    return Batch(
        lengths_B=lengths_B, behavior_BR=behavior_BR, sampled_BR=behavior_BR + 0.2 * noise(),
        teacher_BR=-noise().abs(), reference_BR=behavior_BR + 0.3 * noise(), values_BR=noise(),
        policy_BRV=noise(VOCABULARY), teacher_BRV=noise(VOCABULARY),
    )  # fmt: skip


def advantages(batch: Batch, choices: Choices) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages, returns for the critic) [B, R] of whole groups."""
    count = len(batch.lengths_B)
    inputs = RewardInput(
        lengths_B=batch.lengths_B, finished_B=torch.ones(count, dtype=torch.bool), texts=[""] * count,
        behavior_logprobs_BR=batch.behavior_BR, teacher_logprobs_BR=batch.teacher_BR, answers=[()] * count,
    )  # fmt: skip
    if choices.reward == "minillm":
        reward = minillm_rewards(inputs, gamma=0.9, length_normalize=True, single_step=True)
    else:
        reward = teacher_logprob_rewards(inputs, length_alpha=1.0)
    critic = ppo_advantages(
        reward, batch.lengths_B, batch.behavior_BR, batch.reference_BR, batch.values_BR, PPOConfig(), 0.1
    )
    if choices.algo == "ppo":
        return critic
    config = GRPOConfig(scale=choices.scale, baseline=choices.baseline, epsilon=1e-4)  # type: ignore[arg-type]
    return grpo_advantages(reward, batch.lengths_B, GROUP, config), critic[1]


def counts_of(batch: Batch) -> dict[str, float]:
    """Denominators of the whole batch."""
    return {"tokens": float(batch.lengths_B.sum()), "responses": float(len(batch.lengths_B)), "constant": 5.0}


def terms(
    batch: Batch, advantages_BR: torch.Tensor, returns_BR: torch.Tensor, counts: dict[str, float], choices: Choices
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every loss term of (part of) a batch [terms], and the gradient of their sum by the policy's logits [B, R, V]."""
    mask_BR, width = batch.mask_BR, batch.behavior_BR.shape[1]
    weights_BR = token_weights(batch.lengths_B, width, aggregation=choices.aggregation, **counts)
    importance_BR = mixture_importance(batch.behavior_BR, batch.sampled_BR, batch.lengths_B, by=choices.importance)
    logits_BRV = batch.policy_BRV.detach().requires_grad_()
    logits_SV, teacher_SV = logits_BRV[mask_BR], batch.teacher_BRV[mask_BR]
    weights_S, behavior_S, reference_S = weights_BR[mask_BR], batch.behavior_BR[mask_BR], batch.reference_BR[mask_BR]
    logprobs_S = logits_SV.log_softmax(-1)[:, 0]
    response_S = torch.arange(len(mask_BR))[:, None].expand_as(mask_BR)[mask_BR] * 3 + 7
    importance_S = importance_BR[mask_BR] * truncated_importance(logprobs_S, behavior_S, 2.0)
    policy, _ = policy_loss(
        logprobs_S, behavior_S, advantages_BR[mask_BR], weights_S, response_S, clip_low=0.2, clip_high=0.3,
        ratio=choices.ratio, importance_S=importance_S,
    )  # fmt: skip
    values_S = batch.values_BR[mask_BR]
    teacher_logprobs_SK, ids_SK = teacher_SV.log_softmax(-1).topk(2, -1)
    out = torch.stack([
        policy,
        kl_loss(logprobs_S, reference_S, weights_S, estimator="k2"),
        kl_loss(logprobs_S, reference_S, weights_S, estimator="k3"),
        value_loss(values_S + logprobs_S, values_S, returns_BR[mask_BR], weights_S, clip=0.2),
        lpt_loss(logprobs_S, max(counts["tokens"], 1.0)),
        (reverse_kl(logits_SV, teacher_SV) * weights_S).sum(),
        (generalized_jsd(logits_SV, teacher_SV, 0.3) * weights_S).sum(),
        (sampled_cross_entropy(logits_SV, ids_SK, teacher_logprobs_SK) * weights_S).sum(),
        (tail_reverse_kl(logits_SV, ids_SK, teacher_logprobs_SK) * weights_S).sum(),
    ])  # fmt: skip
    (gradient_BRV,) = torch.autograd.grad(out.sum(), logits_BRV)
    return out.detach(), gradient_BRV


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
some = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-9, atol=1e-9)


@some
@given(batches, settings_of_a_run, st.integers(1, 4))
def test_padding_changes_nothing(batch: Batch, choices: Choices, columns: int) -> None:
    """Traps 1, 5 and 14: more padding, and NaN on it."""
    values, gradient = whole(batch, choices)
    assert torch.isfinite(values).all()
    assert torch.isfinite(gradient).all()
    more_values, more_gradient = whole(batch.padded(columns), choices)
    assert close(values, more_values)
    assert close(gradient, more_gradient[:, :-columns])
    assert float(more_gradient[:, -columns:].abs().max()) == 0.0
    made = advantages(batch.padded(columns), choices)
    assert all(float(value[~batch.padded(columns).mask_BR].abs().max()) == 0.0 for value in made)


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
        if not int(batch.lengths_B[part].sum()):
            gradients.append(torch.zeros_like(gradient[part]))
            continue
        piece, piece_gradient = terms(batch.rows(part), made[0][part], made[1][part], counts_of(batch), choices)
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
    assert close(gradient[rows], other_gradient)


@some
@given(batches, settings_of_a_run)
def test_another_groups_rewards_change_nothing_in_this_group(batch: Batch, choices: Choices) -> None:
    """Without `scale: batch` and whitening, a group's advantages are its own."""
    choices = replace(choices, algo="grpo", scale="group" if choices.scale == "batch" else choices.scale)
    first = list(range(GROUP))
    alone, _ = advantages(batch.rows(first), choices)
    together, _ = advantages(batch, choices)
    assert close(alone, together[:GROUP])


@some
@given(batches, st.floats(0, 1), st.floats(0, 1), st.booleans(), st.sampled_from([0, 1]))
def test_returns_and_advantages_are_the_sums_that_define_them(
    batch: Batch, gamma: float, lam: float, normalize: bool, first: int
) -> None:
    """`mean_return` and `gae` run backwards over the tokens; here each entry is its own sum."""
    rewards_BR, values_BR = batch.teacher_BR, batch.values_BR
    returns_BR = mean_return(rewards_BR, batch.lengths_B, gamma=gamma, normalize=normalize, first=first)
    advantages_BR, targets_BR = gae(rewards_BR, values_BR, batch.lengths_B, gamma=gamma, lam=lam)
    for b, length in enumerate(batch.lengths_B.tolist()):
        rewards, values = rewards_BR[b].tolist(), [*values_BR[b, :length].tolist(), 0.0]
        for t in range(length):
            powers = [gamma ** (k - t - first) for k in range(t + first, length)]
            total = sum(power * rewards[t + first + i] for i, power in enumerate(powers))
            expected = total / sum(powers) if normalize and powers else total
            assert abs(float(returns_BR[b, t]) - expected) < 1e-9
            deltas = [rewards[k] + gamma * values[k + 1] - values[k] for k in range(t, length)]
            expected = sum((gamma * lam) ** i * delta for i, delta in enumerate(deltas))
            assert abs(float(advantages_BR[b, t]) - expected) < 1e-9
            assert abs(float(targets_BR[b, t]) - expected - values[t]) < 1e-9
