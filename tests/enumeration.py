"""Every response that a tiny policy can give: expectations are sums over all of them, so no estimator hides in noise.

The policy is a table of logits, one row for each prefix that can be visited. That is the most general autoregressive
policy: any other's gradient is this one's times a Jacobian, so an estimator that is right here is right for all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from configs.schema import GRPOConfig
from rewards.base import RewardInput, RewardOutput, length_mask
from rewards.teacher_logprob import teacher_logprob_rewards
from training.distillation import ReverseKL, WholeDistribution
from training.grpo import grpo_advantages
from training.losses import policy_loss, token_weights


@dataclass(frozen=True)
class World:
    """All responses over `vocabulary` tokens: those that end with the last token, and those cut at `longest`."""

    vocabulary: int
    longest: int
    ends: bool = True
    """The last token is the end symbol. False: every response has `longest` tokens."""

    @cached_property
    def responses(self) -> list[tuple[int, ...]]:
        """Each response once."""
        if not self.ends:
            return list(itertools.product(range(self.vocabulary), repeat=self.longest))
        inner = range(self.vocabulary - 1)
        ended = [
            (*start, self.vocabulary - 1)
            for before in range(self.longest)
            for start in itertools.product(inner, repeat=before)
        ]
        return ended + list(itertools.product(inner, repeat=self.longest))

    @cached_property
    def states(self) -> dict[tuple[int, ...], int]:
        """Number of each prefix that a token is drawn after."""
        found = sorted({response[:t] for response in self.responses for t in range(len(response))})
        return {prefix: i for i, prefix in enumerate(found)}

    @cached_property
    def lengths_B(self) -> torch.Tensor:
        return torch.tensor([len(r) for r in self.responses])

    @cached_property
    def mask_BR(self) -> torch.Tensor:
        return length_mask(self.lengths_B, self.longest)

    @cached_property
    def finished_B(self) -> torch.Tensor:
        return torch.tensor([self.ends and r[-1] == self.vocabulary - 1 for r in self.responses])

    def _padded(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor([[*row, *[0] * (self.longest - len(row))] for row in rows])

    @cached_property
    def tokens_BR(self) -> torch.Tensor:
        return self._padded(self.responses)

    @cached_property
    def states_BR(self) -> torch.Tensor:
        """The prefix before each token."""
        return self._padded([[self.states[r[:t]] for t in range(len(r))] for r in self.responses])

    def table(self, seed: int, *, scale: float = 1.0) -> torch.Tensor:
        """Random float64 logits [states, V] with gradient."""
        generator = torch.Generator().manual_seed(seed)
        shape = len(self.states), self.vocabulary
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()

    def logprobs(self, table: torch.Tensor) -> torch.Tensor:
        """[B, R] log p(token | all before it), 0 on padding. `table`: logits or log-probabilities."""
        values = table.log_softmax(-1)[self.states_BR].gather(-1, self.tokens_BR[..., None])[..., 0]
        return torch.where(self.mask_BR, values, 0.0)

    def probabilities(self, table: torch.Tensor) -> torch.Tensor:
        """[B] probability of each response; they add up to 1."""
        return self.logprobs(table).sum(1).exp()

    def reverse_kl(self, table: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Exact KL(pi || p) of whole responses."""
        gap_B = (self.logprobs(table) - self.logprobs(other)).sum(1)
        return (self.probabilities(table) * gap_B).sum()

    def inputs(self, behavior: torch.Tensor, teacher: torch.Tensor) -> RewardInput:
        """All responses as one rollout, as rewards see it."""
        return RewardInput(
            lengths_B=self.lengths_B, finished_B=self.finished_B, texts=[""] * len(self.responses),
            behavior_logprobs_BR=self.logprobs(behavior).detach(), teacher_logprobs_BR=self.logprobs(teacher).detach(),
            answers=[()] * len(self.responses),
        )  # fmt: skip

    def surrogate(
        self, table: torch.Tensor, credit_BR: torch.Tensor, weights_BR: torch.Tensor, *,
        behavior: torch.Tensor | None = None, importance_BR: torch.Tensor | None = None, ratio: str = "token",
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """The product's policy loss of the responses `rows` (all by default), with a clip that is out of reach.

        With `weights_BR` = probability of drawing the response x weight of the token, it is the expected loss.
        """
        rows = torch.arange(len(self.responses)) if rows is None else rows
        mask_BR = self.mask_BR[rows]
        behavior_BR = self.logprobs(table if behavior is None else behavior).detach()
        response_BR = torch.arange(len(rows))[:, None].expand_as(mask_BR)
        loss, _ = policy_loss(
            self.logprobs(table)[rows][mask_BR], behavior_BR[rows][mask_BR], credit_BR[mask_BR], weights_BR[mask_BR],
            response_BR[mask_BR], clip_low=0.999, clip_high=1e9, ratio=ratio,
            importance_S=None if importance_BR is None else importance_BR[mask_BR],
        )  # fmt: skip
        return loss

    def groups(self, table: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All ordered groups of `size` responses: rows [groups * size] and the probability of each group."""
        rows = torch.cartesian_prod(*[torch.arange(len(self.responses))] * size).view(-1, size)
        return rows.reshape(-1), self.probabilities(table).detach()[rows].prod(1)

    def per_state(self, table: torch.Tensor, divergence: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Expectation over responses of the sum of `divergence(logits)` at visited states, which are held fixed."""
        chances_B1 = self.probabilities(table).detach()[:, None]
        values_BR = divergence(table)[self.states_BR]
        return torch.where(self.mask_BR, values_BR * chances_B1, 0.0).sum()


def gradient(value: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """d value / d table; the graph is kept."""
    return torch.autograd.grad(value, table, retain_graph=True)[0]


def off_by(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Length of the difference over the length of the exact gradient: a bias as a share."""
    return float((ours - exact).norm() / exact.norm())


def cosine(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Cosine of the angle between two gradients."""
    return float((ours * exact).sum() / (ours.norm() * exact.norm()))


def ones(world: World, rows: torch.Tensor | None = None, **counts: float) -> torch.Tensor:
    """The product's weights of a sum over tokens, not a mean: Dr. GRPO's with a constant of one token."""
    lengths_B = world.lengths_B if rows is None else world.lengths_B[rows]
    counts = {"tokens": 1.0, "responses": 1.0, "constant": 1.0, **counts}
    return token_weights(lengths_B, world.longest, aggregation="constant", **counts).double()


def expected(world: World, table: torch.Tensor, drawn_from: torch.Tensor | None = None) -> torch.Tensor:
    """[B, R] weight of each token in an expectation of a sum over tokens."""
    chances_B = world.probabilities(table).detach() if drawn_from is None else drawn_from
    return chances_B[:, None] * ones(world)


def single_step(world: World, table: torch.Tensor, teacher: torch.Tensor, weights_BR: torch.Tensor) -> torch.Tensor:
    """The product's exact KL at each visited state, times `weights_BR`."""
    term = ReverseKL(WholeDistribution(teacher, torch.eye(world.vocabulary, dtype=torch.float64)))
    kl_S = term(table, slice(0, len(table)))
    return torch.where(world.mask_BR, kl_S[world.states_BR] * weights_BR, 0.0).sum()


def scores(world: World, teacher: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    """[B, R] token rewards whose sum is the response's score."""
    return teacher_logprob_rewards(world.inputs(teacher, teacher), length_alpha=alpha).rewards_BR


def in_groups(
    world: World,
    reward: RewardOutput,
    size: int,
    config: GRPOConfig,
    aggregation: str = "constant",
    *,
    constant: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Expected gradient of the policy loss over all groups of `size`, each a mini-batch with its own counts; table."""
    table = world.table(0)
    rows, chances = world.groups(table, size)
    returns_BR = None if reward.returns_BR is None else reward.returns_BR[rows]
    credit_BR = grpo_advantages(
        RewardOutput(reward.rewards_BR[rows], returns_BR, {}), world.lengths_B[rows], size, config
    )
    weights = [
        token_weights(world.lengths_B[batch], world.longest, aggregation=aggregation,
                      tokens=float(world.lengths_B[batch].sum()), responses=float(size), constant=constant)
        for batch in rows.view(-1, size)
    ]  # fmt: skip
    weights_BR = torch.cat(weights).double() * chances.repeat_interleave(size)[:, None]
    return gradient(world.surrogate(table, credit_BR, weights_BR, rows=rows), table), table


def best_scaled(ours: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """The multiple of a gradient that is nearest to the exact one: a bias that no learning rate mends is left."""
    return ours * (ours * exact).sum() / ours.square().sum()


def centred_scores(world: World, table: torch.Tensor) -> torch.Tensor:
    """[B] scores less their expectation under `table`."""
    score_B = scores(world, world.table(1)).sum(1)
    return score_B - (world.probabilities(table).detach() * score_B).sum()
