"""What each `--recipe` does with the parts: reinforcement learning, and the baselines that it has to beat.

A recipe is a row of this table, not a trainer of its own: whose answers are learnt from, which divergence to the
teacher's distribution is in the loss, whether there is a policy gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from configs.schema import RunConfig
from inference.attention.packing import Group
from rewards.tokens import sum_by_response
from training.advantages import group_scores_advantage, quantile_rewards
from training.experience import Experience, Rewarded
from training.losses import TokenTerm, WholeDistribution, jsd_term, reverse_kl_term, sampled_ce_term
from training.objective import LossWeights, loss_weights

Advantages = tuple[torch.Tensor, torch.Tensor | None]
"""See `Algorithm.advantages`."""


def no_advantages(batch: Rewarded, config: RunConfig, kl_coef: float) -> Advantages:
    """Nothing is learnt from what a response scored."""
    return torch.zeros_like(batch.reward.rewards_S), None


def _quantiles(batch: Rewarded, config: RunConfig, kl_coef: float) -> Advantages:
    """Of a response's rank in its group, not of its score (BOND)."""
    rollout, settings = batch.rollout, replace(config.grpo, scale="none")
    scores_B = quantile_rewards(sum_by_response(batch.reward.rewards_S, rollout.lengths_B), rollout.group_size)
    advantages_B = group_scores_advantage(scores_B, rollout.group_size, settings)
    return advantages_B.repeat_interleave(rollout.lengths_B), None


def first_of_group(experience: Experience) -> list[Group]:
    """Imitated: the (teacher's) answer to each prompt."""
    return _chosen(experience, lambda rows: rows[0])


def best_of_group(experience: Experience) -> list[Group]:
    """Imitated: the response with the highest advantage in its group, which all of its tokens have."""
    rollout = experience.rollout
    of_response = experience.advantages_S.split(rollout.lengths_B.tolist())
    found = [float(part[0]) if len(part) else -math.inf for part in of_response]
    return _chosen(experience, lambda rows: max(rows, key=found.__getitem__))


def _chosen(experience: Experience, choose: Callable[[Sequence[int]], int]) -> list[Group]:
    rollout, group = experience.rollout, experience.rollout.group_size
    out = []
    for n, prompt in enumerate(rollout.prompts_N):
        response = rollout.responses_B[choose(range(n * group, (n + 1) * group))]
        if response:
            out.append(Group(prompt=prompt.tokens, responses=(response,)))
    return out


@dataclass(frozen=True)
class Recipe:
    title: str
    """What it is called in the model card; {algo} and {reward} are the run's."""
    teacher_answers: bool = False
    """The teacher answers the prompts, not the student."""
    imitated: Callable[[Experience], list[Group]] | None = None
    """What is imitated (cross-entropy) in place of the warm-up answers."""
    advantages: Callable[[Rewarded, RunConfig, float], Advantages] | None = None
    """In place of the algorithm's own; there is no critic then. `no_advantages`: nor a policy gradient."""
    divergence: Callable[[WholeDistribution, RunConfig, int], TokenTerm] = lambda teacher, *_: reverse_kl_term(teacher)
    """What compares the student with the teacher at each state; the last argument seeds its draws, if it has any."""
    always_divergence: bool = False
    """It is the loss: weight 1 unless loss.single_step_coef says otherwise."""
    draws: bool = False
    """That comparison draws at random, for each packed row anew."""
    ranks_groups: bool = False
    """The rank of a response in its group is what counts."""
    interpolate: bool = False
    """The export is moved back towards the start of the run."""
    settings: tuple[str, ...] = ()
    """What it alone reads of `distill`."""

    @property
    def policy_gradient(self) -> bool:
        """L_policy and the KL to the reference take part."""
        return self.advantages is not no_advantages

    def weights(self, config: RunConfig, step: int, same_tokenizer: bool) -> LossWeights:
        """The weights of step `step` as this recipe uses them."""
        loss = config.loss
        if self.always_divergence and loss.single_step_coef is None:
            loss = replace(loss, single_step_coef=1.0)
        if self.imitated is not None and self.teacher_answers:
            loss = replace(loss, bc_coef=loss.bc_coef or 1.0)
        weights = loss_weights(replace(config, loss=loss), step, same_tokenizer)
        if not self.policy_gradient:
            weights = replace(weights, policy=0.0, kl=0.0)
            if not self.always_divergence:
                weights = replace(weights, single_step=0.0)
        if self.imitated is not None and not self.teacher_answers:
            share = config.distill.bond_forward
            weights = replace(weights, bc=share, policy=weights.policy * (1.0 - share), single_step=0.0)
        return weights


RECIPES: dict[str, Recipe] = {
    "rl": Recipe("reinforcement learning ({algo} + {reward})"),
    # Sequence-level knowledge distillation (arXiv 1606.07947): supervised on the teacher's answers.
    "seqkd": Recipe(
        "sequence-level distillation", teacher_answers=True, imitated=first_of_group, advantages=no_advantages
    ),
    # Gemma 3 (arXiv 2503.19786, section 3), on the teacher's answers.
    "sampled_ce": Recipe(
        "cross-entropy on sampled tokens",
        teacher_answers=True,
        advantages=no_advantages,
        divergence=lambda teacher, config, seed: sampled_ce_term(teacher, config.distill.sampled_tokens, seed),
        always_divergence=True,
        draws=True,
        settings=("sampled_tokens",),
    ),
    # On-policy generalised knowledge distillation (arXiv 2306.13649): no gradient through sampling.
    "gkd": Recipe(
        "generalised knowledge distillation",
        advantages=no_advantages,
        divergence=lambda teacher, config, seed: jsd_term(teacher, config.distill.jsd_beta),
        always_divergence=True,
        settings=("jsd_beta",),
    ),
    # Best-of-N distillation (arXiv 2407.14622): imitate the best, and climb the quantile reward.
    "bond": Recipe(
        "best-of-N distillation ({reward})",
        imitated=best_of_group,
        advantages=_quantiles,
        ranks_groups=True,
        settings=("bond_forward",),
    ),
    # Averaged policies (arXiv 2406.16768): set reference.update: ema as the anchor.
    "warp": Recipe("{algo} + {reward} with averaged weights", interpolate=True, settings=("warp_rate",)),
}
