"""What one rank has of a step before advantages are made, and how groups of it are chosen and put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from rewards.base import RewardOutput
from training.distillation import WholeDistribution
from training.experience import Rollout, TeacherEntries, TeacherView, tokens_of_rows


@dataclass(frozen=True)
class Batch:
    """One rank's answers to its prompts of a step, with everything that was said of them."""

    rollout: Rollout
    view: TeacherView
    reward: RewardOutput
    old_BR: torch.Tensor | None
    """float32 [B, R] log pi by the training forward, where importance weights need it."""
    reference_BR: torch.Tensor | None
    """float32 [B, R] log pi_ref."""
    start_BR: torch.Tensor | None
    """float32 [B, R] log-probabilities of the start of the run, where they are limited."""
    values_BR: torch.Tensor | None
    """float32 [B, R] the critic's."""
    importance_BR: torch.Tensor | None
    """float32 [B, R] weights of samples that the policy itself did not draw, or None: all 1."""
    reference_states: WholeDistribution | None
    """The reference's whole distribution at each token, for the full KL."""


def replaced(batch: Batch, fresh: Batch, places: Sequence[int]) -> Batch:
    """The first groups of `fresh` in these places of `batch`; both have the same group size."""
    count, group = len(batch.rollout.prompts), batch.rollout.group_size
    order = [count + places.index(n) if n in places else n for n in range(count)]
    rows = [n * group + g for n in order for g in range(group)]
    one, two = batch.rollout, fresh.rollout
    tokens = tokens_of_rows(torch.cat([one.lengths_B, two.lengths_B]), rows)

    def by_response(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
        if a is None or b is None:
            return None
        longest = max(a.shape[1], b.shape[1])
        return torch.cat([F.pad(x, (0, longest - x.shape[1])) for x in (a, b)])[rows]

    def padded(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        both = by_response(a, b)
        assert both is not None
        return both

    hidden = [x.view.hidden_SD for x in (batch, fresh)]
    some = [x.view.entries for x in (batch, fresh)]
    states = [x.reference_states for x in (batch, fresh)]
    return Batch(
        rollout=replace(
            one,
            prompts=[(*one.prompts, *two.prompts)[n] for n in order],
            responses=[(*one.responses, *two.responses)[b] for b in rows],
            texts=[(*one.texts, *two.texts)[b] for b in rows],
            finished_B=torch.cat([one.finished_B, two.finished_B])[rows],
            behavior_logprobs_BR=padded(one.behavior_logprobs_BR, two.behavior_logprobs_BR),
            sampled_logprobs_BR=padded(one.sampled_logprobs_BR, two.sampled_logprobs_BR),
        ),
        view=TeacherView(
            padded(batch.view.logprobs_BR, fresh.view.logprobs_BR),
            None if hidden[0] is None or hidden[1] is None else torch.cat([hidden[0], hidden[1]])[tokens],
            batch.view.scored_tokens + fresh.view.scored_tokens,
            None
            if some[0] is None or some[1] is None
            else TeacherEntries(
                torch.cat([some[0].ids_SK, some[1].ids_SK])[tokens],
                torch.cat([some[0].logprobs_SK, some[1].logprobs_SK])[tokens],
            ),
            batch.view.unread_tokens + fresh.view.unread_tokens,
        ),
        reward=RewardOutput(
            padded(batch.reward.rewards_BR, fresh.reward.rewards_BR),
            by_response(batch.reward.returns_BR, fresh.reward.returns_BR),
            {k: torch.cat([v, fresh.reward.parts[k]])[rows] for k, v in batch.reward.parts.items()},
        ),
        old_BR=by_response(batch.old_BR, fresh.old_BR),
        reference_BR=by_response(batch.reference_BR, fresh.reference_BR),
        start_BR=by_response(batch.start_BR, fresh.start_BR),
        values_BR=by_response(batch.values_BR, fresh.values_BR),
        importance_BR=by_response(batch.importance_BR, fresh.importance_BR),
        reference_states=None
        if states[0] is None or states[1] is None
        else WholeDistribution(torch.cat([states[0].hidden_SD, states[1].hidden_SD])[tokens], states[0].output_VD),
    )


def has_signal(batch: Batch) -> torch.Tensor:
    """bool [N]: the group's responses are not all credited alike. A group without a score has no signal."""
    group, rollout, reward = batch.rollout.group_size, batch.rollout, batch.reward
    if reward.returns_BR is None:
        scores_NG = reward.rewards_BR.sum(1).view(-1, group)
        return (scores_NG != scores_NG[:, :1]).any(1)
    kept_NT = rollout.mask_BR.view(-1, group * rollout.mask_BR.shape[1])
    returns_NT = reward.returns_BR.reshape(kept_NT.shape)
    high_N = torch.where(kept_NT, returns_NT, -torch.inf).max(1).values
    return high_N > torch.where(kept_NT, returns_NT, torch.inf).min(1).values
