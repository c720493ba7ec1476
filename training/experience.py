"""What flows through one step: Rollout, Scored, Rewarded, Experience, each holding the one before
(docs/architecture.md).

Everything is this rank's share of the batch. A field's suffix names its first axis, and `take` and `join` go by it: `N`
prompts, `B` = N * G responses ordered by prompt, `S` all response tokens in batch order (b, then t). A field without
such a suffix belongs to the batch as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch

from configs.prompts import Asked, Turn
from inference.attention.packing import Group, groups_of
from rewards.base import RewardOutput
from training.losses import WholeDistribution

Carrier = TypeVar("Carrier")


@dataclass(frozen=True)
class Prompt:
    """One question, rendered and tokenised."""

    index: int
    """Place in the data file (after skipping); names the prompt in seeds and logs."""
    text: str
    """The rendered prompt; a conversation as a plain model reads it."""
    tokens: tuple[int, ...]
    """Student token ids."""
    answers: tuple[str, ...]
    """Accepted answers; may be empty."""
    question: str
    """The question alone."""
    context: str | None = None
    """The context it is asked of."""
    id: str = ""
    """The data's own name for it."""
    pattern: str | None = None
    """Regular expression of the right answers to an open question."""
    question_en: str | None = None
    """The question in English, where the data has it."""
    context_en: str | None = None
    """The context in English, where the data has it."""
    turns: tuple[Turn, ...] = ()
    """The conversation that it ends, where there are turns before it."""

    @property
    def asked(self) -> Asked:
        """What a model's `Format` takes."""
        return self.turns or self.text


@dataclass(frozen=True)
class Corpus:
    """Everything that a step draws from; the same on every rank."""

    prompts: Sequence[Prompt]
    """RL prompts."""
    text: Sequence[Sequence[Group]]
    """L_PT blocks, each as the groups that it is packed from (training/data/text.py); empty where L_PT is off."""
    cloning: Sequence[Group]
    """L_BC examples; empty where L_BC is off."""
    validation: Sequence[Prompt] = ()
    """Questions of the validation in the loop; empty where that is off."""


@dataclass(frozen=True)
class Samples:
    """Responses of a sampler, ordered by prompt."""

    responses_B: Sequence[tuple[int, ...]]
    """Token ids, the end symbol included where there is one."""
    finished_B: torch.Tensor
    """bool, the response ended with an end symbol."""
    behavior_logprobs_S: torch.Tensor
    """float32 log-probability under the full softmax at the sampling temperature, nats. The importance ratio uses
    these."""
    sampled_logprobs_S: torch.Tensor
    """float32 log-probability under the distribution that was drawn from (mixed with the teacher's or not), nats."""


@dataclass(frozen=True)
class Rollout(Samples):
    """What was sampled, with the prompts."""

    prompts_N: Sequence[Prompt]
    group_size: int
    """G."""
    texts_B: Sequence[str]
    """Response texts, special symbols removed, stripped."""

    @property
    def lengths_B(self) -> torch.Tensor:
        """int64 tokens of each response; they sum to S."""
        return torch.tensor([len(r) for r in self.responses_B], dtype=torch.int64)

    def groups(self) -> list[Group]:
        """The rollout as groups for packing, in student tokens."""
        return groups_of([p.tokens for p in self.prompts_N], self.responses_B, self.group_size)

    def prompt_of_response(self) -> list[Prompt]:
        """Each response's prompt, B of them."""
        return [prompt for prompt in self.prompts_N for _ in range(self.group_size)]


@dataclass(frozen=True)
class TeacherView:
    """What one teacher says of a rollout, carried to the student's tokens."""

    logprobs_S: torch.Tensor
    """float32 nats; with different tokenizers those of its own tokens, carried over (rewards/alignment.py), and NaN in
    a response that it has no room for."""
    scored_tokens_B: torch.Tensor
    """int64 tokens of each response that it scored, in its own tokens."""
    unread_tokens_B: torch.Tensor
    """int64 student tokens that it could not read: the beginning of a character that was cut off."""
    hidden_SD: torch.Tensor | None = None
    """float32 its last hidden state before each token, where the whole distribution was asked for."""
    top_ids_SK: torch.Tensor | None = None
    """int64 the K likeliest entries in place of its hidden states."""
    top_logprobs_SK: torch.Tensor | None = None
    """float32 nats of those, of the whole softmax."""


@dataclass(frozen=True)
class Scored:
    """A rollout with what teachers, reference and critic say of it. What nobody needs is None."""

    rollout: Rollout
    teacher: TeacherView
    others: tuple[TeacherView, ...] = ()
    """The teachers of config.teachers, in its order."""
    bilingual_B: torch.Tensor | None = None
    """float32 the part of the reward for which teacher and translator are asked, where it has a weight."""
    policy_logprobs_S: torch.Tensor | None = None
    """float32 log pi by the training forward, where importance weights or the ratio need it."""
    reference_logprobs_S: torch.Tensor | None = None
    """float32 log pi_ref."""
    reference: WholeDistribution | None = None
    """The reference's whole distribution, for the full KL."""
    start_logprobs_S: torch.Tensor | None = None
    """float32 log-probabilities of the start of the run, where the distance to it is limited."""
    values_S: torch.Tensor | None = None
    """float32 the critic's value before each token."""
    importance_S: torch.Tensor | None = None
    """float32 weights of samples that the policy itself did not draw. None: all 1."""


@dataclass(frozen=True)
class Rewarded:
    """What was scored, with the configured reward."""

    scored: Scored
    reward: RewardOutput

    @property
    def rollout(self) -> Rollout:
        return self.scored.rollout


@dataclass(frozen=True)
class Experience:
    """What was rewarded, with what the update learns from."""

    rewarded: Rewarded
    advantages_S: torch.Tensor
    """float32."""
    value_targets_S: torch.Tensor | None = None
    """float32 what the critic is trained towards."""

    @property
    def scored(self) -> Scored:
        return self.rewarded.scored

    @property
    def rollout(self) -> Rollout:
        return self.rewarded.scored.rollout


AXIS = re.compile(r"_([NBS])[A-Z]?$")
"""A field's first axis."""


def take(batch: Carrier, groups: Sequence[int]) -> Carrier:
    """Some of a batch's groups, by their place in `prompts_N`, in the order asked for; a place may come twice."""
    rollout: Any = getattr(batch, "rollout", batch)
    lengths, ends = rollout.lengths_B.tolist(), rollout.lengths_B.cumsum(0).tolist()
    rows = [n * rollout.group_size + g for n in groups for g in range(rollout.group_size)]
    tokens = [s for b in rows for s in range(ends[b] - lengths[b], ends[b])]
    places = {"N": list(groups), "B": rows, "S": tokens}

    def pick(axis: str, values: Any) -> Any:
        return values[places[axis]] if isinstance(values, torch.Tensor) else [values[i] for i in places[axis]]

    return _by_axis(pick, None, batch)


def join(first: Carrier, second: Carrier) -> Carrier:
    """The groups of `first`, then those of `second`: two batches of the same kind and group size."""

    def both(axis: str, one: Any, two: Any) -> Any:
        return torch.cat([one, two]) if isinstance(one, torch.Tensor) else [*one, *two]

    return _by_axis(both, None, first, second)


def _by_axis(change: Callable[..., Any], axis: str | None, *values: Any) -> Any:
    """`change(axis, *values)` of each field with an axis, of values of one kind and all that they hold; what belongs
    to the batch as a whole is the first one's."""
    first = values[0]
    if any(value is None for value in values):
        return None
    if isinstance(first, Mapping):
        return {key: _by_axis(change, axis, *(value[key] for value in values)) for key in first}
    if axis is not None:
        return change(axis, *values)
    if is_dataclass(first) and not isinstance(first, type):
        axes = {f.name: AXIS.search(f.name) for f in fields(first)}
        parts = {
            name: _by_axis(change, found and found.group(1), *(getattr(value, name) for value in values))
            for name, found in axes.items()
        }
        return replace(first, **parts)
    if isinstance(first, tuple):
        return tuple(_by_axis(change, None, *some) for some in zip(*values, strict=True))
    return first
