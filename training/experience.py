"""What flows through one step (docs/architecture.md). N prompts, G responses each, B = N*G, R longest response.

All tensors are this rank's share of the batch unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from inference.packing import Group, groups_of
from rewards.base import length_mask
from training.distillation import WholeDistribution


@dataclass(frozen=True)
class Prompt:
    """One question, rendered and tokenised."""

    index: int
    """Place in the data file (after skipping); names the prompt in seeds and logs."""
    text: str
    """The rendered prompt."""
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
    chat: bool = False
    """`text` is a user's message, and each model reads it in its own chat template."""
    question_en: str | None = None
    """The question in English, where the data has it."""
    context_en: str | None = None
    """The context in English, where the data has it."""


@dataclass(frozen=True)
class Rollout:
    """What the actor sampled."""

    prompts: Sequence[Prompt]
    """N prompts."""
    group_size: int
    """G."""
    responses: Sequence[tuple[int, ...]]
    """B responses as token ids, ordered by prompt, the end symbol included where there is one."""
    finished_B: torch.Tensor
    """bool [B] the response ended with an end symbol."""
    behavior_logprobs_BR: torch.Tensor
    """float32 [B, R] log-probability under the full softmax at the sampling temperature, nats; 0 on padding. The
    importance ratio uses these."""
    sampled_logprobs_BR: torch.Tensor
    """float32 [B, R] log-probability under the truncated (top-k, top-p) distribution that was drawn from."""
    texts: Sequence[str]
    """B response texts, special symbols removed, stripped."""

    @property
    def lengths_B(self) -> torch.Tensor:
        """int64 [B] tokens of each response."""
        return torch.tensor([len(r) for r in self.responses], dtype=torch.int64)

    @property
    def mask_BR(self) -> torch.Tensor:
        """bool [B, R]."""
        return length_mask(self.lengths_B, self.behavior_logprobs_BR.shape[1])

    def select(self, prompts: Sequence[int]) -> Rollout:
        """The rollout of some of the prompts, by their place in `prompts`."""
        rows = self.rows_of(prompts)
        return Rollout(
            prompts=[self.prompts[n] for n in prompts],
            group_size=self.group_size,
            responses=[self.responses[b] for b in rows],
            finished_B=self.finished_B[rows],
            behavior_logprobs_BR=self.behavior_logprobs_BR[rows],
            sampled_logprobs_BR=self.sampled_logprobs_BR[rows],
            texts=[self.texts[b] for b in rows],
        )

    def rows_of(self, prompts: Sequence[int]) -> list[int]:
        """Batch indices b of the responses to these prompts."""
        return [n * self.group_size + g for n in prompts for g in range(self.group_size)]

    def groups(self) -> list[Group]:
        """The rollout as groups for packing, in student tokens."""
        return groups_of([p.tokens for p in self.prompts], self.responses, self.group_size)


def tokens_of_rows(lengths_B: torch.Tensor, rows: Sequence[int]) -> list[int]:
    """Places, among all response tokens in batch order, of the tokens of some responses."""
    starts_B = torch.cumsum(lengths_B, 0) - lengths_B
    return [s for b in rows for s in range(int(starts_B[b]), int(starts_B[b] + lengths_B[b]))]


@dataclass(frozen=True)
class TeacherEntries:
    """K entries of the teacher's distribution before each response token in batch order; the rest has the rest."""

    ids_SK: torch.Tensor
    """int64 [S, K]."""
    logprobs_SK: torch.Tensor
    """float32 [S, K] nats, of the whole softmax."""

    def select(self, tokens: Sequence[int] | torch.Tensor) -> TeacherEntries:
        """Those of some of the tokens."""
        return TeacherEntries(self.ids_SK[tokens], self.logprobs_SK[tokens])


@dataclass(frozen=True)
class TeacherView:
    """What the teacher says of a rollout, carried to the student's tokens."""

    logprobs_BR: torch.Tensor
    """float32 [B, R] nats; with different tokenizers those of its own tokens, carried over (rewards/alignment.py)."""
    hidden_SD: torch.Tensor | None
    """float32 [S, D] teacher's last hidden state for each response token in batch order (b, then t), or None."""
    scored_tokens: int
    """Response tokens that the teacher scored, in its own tokens."""
    entries: TeacherEntries | None = None
    """The teacher's likeliest entries in place of its hidden states, or None."""
    unread_tokens: int = 0
    """Response tokens of the student that the teacher could not read: the beginning of a character that was cut off."""


@dataclass(frozen=True)
class Experience:
    """A rollout with everything that the update needs."""

    rollout: Rollout
    advantages_BR: torch.Tensor
    """float32 [B, R], 0 on padding."""
    reference_logprobs_BR: torch.Tensor | None
    """float32 [B, R] of the frozen reference, or None when no KL term is in the loss."""
    teacher_hidden_SD: torch.Tensor | None
    """float32 [S, D] for the single-step term, or None."""
    values_BR: torch.Tensor | None = None
    """float32 [B, R] critic's value before each token (PPO)."""
    returns_BR: torch.Tensor | None = None
    """float32 [B, R] what the critic is trained towards (PPO)."""
    old_logprobs_BR: torch.Tensor | None = None
    """float32 [B, R] of the training forward before the first update, where the ratio is taken to that."""
    importance_BR: torch.Tensor | None = None
    """float32 [B, R] weights of samples that the policy itself did not draw, or None: all 1."""
    teacher_entries: TeacherEntries | None = None
    """In place of `teacher_hidden_SD`, where only the likeliest entries were asked for."""
    reference_states: WholeDistribution | None = None
    """The reference's whole distribution at each response token in batch order, for the full KL, or None."""

    def select(self, prompts: Sequence[int]) -> Experience:
        """The experience of some of the prompts, by their place in the rollout."""
        rows = self.rollout.rows_of(prompts)
        tokens = tokens_of_rows(self.rollout.lengths_B, rows)

        def pick(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor[rows]

        return Experience(
            rollout=self.rollout.select(prompts),
            advantages_BR=self.advantages_BR[rows],
            reference_logprobs_BR=pick(self.reference_logprobs_BR),
            teacher_hidden_SD=None if self.teacher_hidden_SD is None else self.teacher_hidden_SD[tokens],
            values_BR=pick(self.values_BR),
            returns_BR=pick(self.returns_BR),
            old_logprobs_BR=pick(self.old_logprobs_BR),
            importance_BR=pick(self.importance_BR),
            teacher_entries=None if self.teacher_entries is None else self.teacher_entries.select(tokens),
            reference_states=None if self.reference_states is None else self.reference_states.select(tokens),
        )


def batch_order(lengths_B: torch.Tensor, longest: int) -> torch.Tensor:
    """int64 [B, R]: place of token (b, t) among all response tokens in batch order (b, then t)."""
    starts = torch.cumsum(lengths_B, 0) - lengths_B
    return starts[:, None] + torch.arange(longest)[None, :]
