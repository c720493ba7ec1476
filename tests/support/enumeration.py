"""Every response that a tiny policy can give: expectations are sums over all of them, so no estimator hides in noise.

The policy is a table of logits, one row for each prefix that can be visited. That is the most general autoregressive
policy: any other's gradient is this one's times a Jacobian, so an estimator that is right here is right for all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from configs.schema import GRPOConfig, LossConfig
from rewards.base import RewardInput, RewardOutput
from rewards.teacher_logprob import teacher_logprob_rewards
from rewards.tokens import place_in_response, sum_by_response
from training.grpo import grpo_advantages
from training.losses import OutputLayer, PolicyTokens, WholeDistribution, policy_loss, reverse_kl_term, token_weights


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
    def finished_B(self) -> torch.Tensor:
        return torch.tensor([self.ends and r[-1] == self.vocabulary - 1 for r in self.responses])

    @cached_property
    def tokens_S(self) -> torch.Tensor:
        return torch.tensor([token for r in self.responses for token in r])

    @cached_property
    def states_S(self) -> torch.Tensor:
        """The prefix before each token."""
        return torch.tensor([self.states[r[:t]] for r in self.responses for t in range(len(r))])

    def total(self, values_S: torch.Tensor) -> torch.Tensor:
        """[B] sum over each response."""
        return sum_by_response(values_S, self.lengths_B)

    def each(self, values_B: torch.Tensor) -> torch.Tensor:
        """[S] a response's value for each of its tokens."""
        return values_B.repeat_interleave(self.lengths_B)

    def places(self, rows: torch.Tensor) -> torch.Tensor:
        """Places of the tokens of some responses, which may come again."""
        lengths = self.lengths_B[rows]
        starts = (self.lengths_B.cumsum(0) - self.lengths_B)[rows]
        return starts.repeat_interleave(lengths) + place_in_response(lengths)

    def table(self, seed: int, *, scale: float = 1.0) -> torch.Tensor:
        """Random float64 logits [states, V] with gradient."""
        generator = torch.Generator().manual_seed(seed)
        shape = len(self.states), self.vocabulary
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()

    def logprobs(self, table: torch.Tensor) -> torch.Tensor:
        """[S] log p(token | all before it). `table`: logits or log-probabilities."""
        return table.log_softmax(-1)[self.states_S, self.tokens_S]

    def probabilities(self, table: torch.Tensor) -> torch.Tensor:
        """[B] probability of each response; they add up to 1."""
        return self.total(self.logprobs(table)).exp()

    def reverse_kl(self, table: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Exact KL(pi || p) of whole responses."""
        gap_B = self.total(self.logprobs(table) - self.logprobs(other))
        return (self.probabilities(table) * gap_B).sum()

    def inputs(self, behavior: torch.Tensor, teacher: torch.Tensor) -> RewardInput:
        """All responses as one rollout, as rewards see it."""
        return RewardInput(
            lengths_B=self.lengths_B,
            finished_B=self.finished_B,
            behavior_logprobs_S=self.logprobs(behavior).detach(),
            teacher_logprobs_S=self.logprobs(teacher).detach(),
            texts_B=[""] * len(self.responses),
            answers_B=[()] * len(self.responses),
        )

    def surrogate(
        self,
        table: torch.Tensor,
        credit_S: torch.Tensor,
        weights_S: torch.Tensor,
        *,
        behavior: torch.Tensor | None = None,
        importance_S: torch.Tensor | None = None,
        ratio: Literal["token", "sequence"] = "token",
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The product's policy loss of the responses `rows` (all by default), with a clip that is out of reach.

        With `weights_S` = probability of drawing the response x weight of the token, it is the expected loss.
        """
        rows = torch.arange(len(self.responses)) if rows is None else rows
        at = self.places(rows)
        behavior_S = self.logprobs(table if behavior is None else behavior).detach()
        response_S = torch.arange(len(rows)).repeat_interleave(self.lengths_B[rows])
        weights_S = weights_S if importance_S is None else weights_S * importance_S
        tokens = PolicyTokens(self.logprobs(table)[at], behavior_S[at], credit_S, weights_S, response_S)
        return policy_loss(tokens, LossConfig(clip_low=0.999, clip_high=1e9, ratio=ratio))[0]

    def groups(self, table: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All ordered groups of `size` responses: rows [groups * size] and the probability of each group."""
        rows = torch.cartesian_prod(*[torch.arange(len(self.responses))] * size).view(-1, size)
        return rows.reshape(-1), self.probabilities(table).detach()[rows].prod(1)

    def per_state(self, table: torch.Tensor, divergence: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Expectation over responses of the sum of `divergence(logits)` at visited states, which are held fixed."""
        chances_S = self.each(self.probabilities(table).detach())
        return (divergence(table)[self.states_S] * chances_S).sum()


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
    return token_weights(lengths_B, "constant", **counts).double()


def expected(world: World, table: torch.Tensor, drawn_from: torch.Tensor | None = None) -> torch.Tensor:
    """[S] weight of each token in an expectation of a sum over tokens."""
    chances_B = world.probabilities(table).detach() if drawn_from is None else drawn_from
    return world.each(chances_B) * ones(world)


def single_step(world: World, table: torch.Tensor, teacher: torch.Tensor, weights_S: torch.Tensor) -> torch.Tensor:
    """The product's exact KL at each visited state, times `weights_S`."""
    term = reverse_kl_term(WholeDistribution(teacher, OutputLayer(torch.eye(world.vocabulary, dtype=torch.float64))))
    kl_S = term(table, slice(0, len(table)))
    return (kl_S[world.states_S] * weights_S).sum()


def scores(world: World, teacher: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    """[S] token rewards whose sum is the response's score."""
    return teacher_logprob_rewards(world.inputs(teacher, teacher), length_alpha=alpha).rewards_S


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
    at = world.places(rows)
    returns_S = None if reward.returns_S is None else reward.returns_S[at]
    credit_S = grpo_advantages(RewardOutput(reward.rewards_S[at], returns_S, {}), world.lengths_B[rows], size, config)
    weights = [
        token_weights(
            world.lengths_B[batch],
            aggregation,
            tokens=float(world.lengths_B[batch].sum()),
            responses=float(size),
            constant=constant,
        )
        for batch in rows.view(-1, size)
    ]
    chances_S = chances.repeat_interleave(size).repeat_interleave(world.lengths_B[rows])
    weights_S = torch.cat(weights).double() * chances_S
    return gradient(world.surrogate(table, credit_S, weights_S, rows=rows), table), table


def best_scaled(ours: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """The multiple of a gradient that is nearest to the exact one: a bias that no learning rate mends is left."""
    return ours * (ours * exact).sum() / ours.square().sum()


def centred_scores(world: World, table: torch.Tensor) -> torch.Tensor:
    """[B] scores less their expectation under `table`."""
    score_B = world.total(scores(world, world.table(1)))
    return score_B - (world.probabilities(table).detach() * score_B).sum()
