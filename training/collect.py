"""From a step's prompts to what the update learns from: answers, scores, rewards, advantages."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from configs.schema import RunConfig
from inference.client import TeacherLost
from inference.packing import Group
from rewards.base import RewardInput, RewardOutput
from rewards.combine import Opinion, Part, add_parts, weighted_sum
from rewards.minillm import minillm_rewards
from rewards.teacher_logprob import teacher_logprob_rewards
from training import distributed
from training.actor import Actor
from training.advantages import group_scores_advantage, quantile_rewards
from training.batch import Batch, has_signal, replaced
from training.bilingual import Bilingual
from training.clock import Clock
from training.composite import LossWeights
from training.critic import Critic
from training.data import replacement_positions
from training.experience import Experience, Prompt, Rollout, TeacherView
from training.extra_rewards import extra_parts
from training.grpo import grpo_advantages
from training.losses import truncated_importance
from training.mixing import TokenMixture, importance_of, mix_responses, teacher_rollout
from training.ppo import ppo_advantages
from training.recipes import RECIPES
from training.reference import Reference
from training.teaching import TeacherLink

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Models:
    """Who takes part."""

    actor: Actor
    reference: Reference | None
    critic: Critic | None
    teacher: TeacherLink
    start: Reference | None = None
    """The start of the run, where reference.kl_limit is set and the reference itself moves."""
    others: Sequence[TeacherLink] = ()
    """The teachers of config.teachers, in its order."""
    bilingual: Bilingual | None = None
    """Translator of the part `bilingual`, where it has a weight."""


def collect(
    models: Models, config: RunConfig, prompts: Sequence[Prompt], pool: Sequence[Prompt], step: int,
    weights: LossWeights, clock: Clock,
) -> Batch:  # fmt: skip
    """Answer the prompts; where grpo.no_signal is `resample`, answer others in place of groups that teach nothing.

    `pool`: all RL prompts. Collective.
    """
    batch = _answered(models, config, prompts, step, weights, clock)
    if config.grpo.no_signal != "resample" or config.algo != "grpo":
        return batch
    first = config.prompts_per_step * distributed.rank() // distributed.world_size()
    for attempt in range(config.grpo.resample_rounds):
        silent = torch.nonzero(~has_signal(batch)).flatten().tolist()
        if not distributed.any_rank(bool(silent)):
            break
        # A rank without such a group answers one prompt as well, which is then not used: sampling is in step.
        slots = [first + n for n in silent] or [first]
        chosen = replacement_positions(slots, len(pool), config.seed, step, attempt)
        fresh = _answered(models, config, [pool[i] for i in chosen], step, weights, clock)
        batch = replaced(batch, fresh, silent)
    return batch


def _answered(
    models: Models, config: RunConfig, prompts: Sequence[Prompt], step: int, weights: LossWeights, clock: Clock
) -> Batch:  # fmt: skip
    """Sample, then the teacher's scores while reference and critic run."""
    with clock("sample"):
        rollout = distributed.together(lambda: _answers(models, config, prompts, step), TeacherLost)
    waiting = models.teacher.ask(
        rollout, whole_distribution=weights.single_step > 0, entries=config.loss.single_step_entries
    )
    others = [link.ask(rollout, whole_distribution=False) for link in models.others]
    translated = models.bilingual.ask(rollout) if models.bilingual else None
    full = config.loss.kl_estimator == "full" and weights.kl > 0
    with clock("reference"):
        reference_BR = models.reference.logprobs(rollout) if models.reference else None
        states = models.reference.states(rollout) if models.reference and full else None
        start_BR = models.start.logprobs(rollout) if models.start else None
        values_BR = models.critic.values(rollout) if models.critic else None
        old_BR = models.actor.logprobs(rollout) if config.loss.importance_cap is not None else None
    with clock("teacher"):
        view, *beside = distributed.together(lambda: [wait() for wait in (waiting, *others)], TeacherLost)
        marks = [distributed.together(translated, TeacherLost)] if translated else []
    reward = reward_of(rollout, view, config, weights.single_step > 0, beside, marks)
    importance_BR = importance_of(rollout, view, config)
    if old_BR is not None and config.loss.importance_cap is not None:
        cut_BR = truncated_importance(old_BR, rollout.behavior_logprobs_BR, config.loss.importance_cap)
        importance_BR = cut_BR if importance_BR is None else importance_BR * cut_BR
    return Batch(rollout, view, reward, old_BR, reference_BR, start_BR, values_BR, importance_BR, states)


def _answers(models: Models, config: RunConfig, prompts: Sequence[Prompt], step: int) -> Rollout:
    """Responses of the student, of the teacher, or of both."""
    actor, link, sampling = models.actor, models.teacher, config.sampling
    if RECIPES[config.recipe].teacher_answers:
        return teacher_rollout(actor, link, prompts, config, step)
    if sampling.teacher_mix == 0 or not prompts:
        return actor.sample(prompts, step=step)
    if sampling.mix_by == "response":
        return mix_responses(actor, link, actor.sample(prompts, step=step), config, step)
    mixture = TokenMixture(link, prompts, sampling.teacher_mix, sampling.group_size, sampling.max_new_tokens)
    try:
        return actor.sample(prompts, step=step, mixture=mixture)
    finally:
        mixture.close()


def reward_of(
    rollout: Rollout, view: TeacherView, config: RunConfig, single_step: bool, others: Sequence[TeacherView] = (),
    marks: Sequence[Part] = (),
) -> RewardOutput:  # fmt: skip
    """The configured reward of a rollout by its teacher and by the `others` of config.teachers, with its extra parts
    and `marks` added. The exact single-step term, where there is one, is to the first teacher: the others' rewards are
    whole."""
    inputs = RewardInput(
        lengths_B=rollout.lengths_B,
        finished_B=rollout.finished_B,
        behavior_logprobs_BR=rollout.behavior_logprobs_BR,
        teacher_logprobs_BR=view.logprobs_BR,
        texts=rollout.texts,
        answers=[p.answers for p in rollout.prompts for _ in range(rollout.group_size)],
    )
    opinions = [Opinion(None, config.rewards.teacher_weight, _teacher_reward(inputs, config, single_step))]
    for teacher, other in zip(config.teachers, others, strict=True):
        asked = replace(inputs, teacher_logprobs_BR=other.logprobs_BR)
        opinions.append(Opinion(teacher.name, teacher.weight, _teacher_reward(asked, config, False)))
    reward = weighted_sum(opinions)
    return add_parts(reward, inputs, [*extra_parts(inputs, rollout, config), *marks])


def _teacher_reward(inputs: RewardInput, config: RunConfig, single_step: bool) -> RewardOutput:
    """One teacher's reward, by config.reward."""
    rewards = config.rewards
    if config.reward == "minillm":
        return minillm_rewards(
            inputs, gamma=rewards.gamma, length_normalize=rewards.length_normalize, single_step=single_step
        )
    return teacher_logprob_rewards(inputs, length_alpha=rewards.length_alpha)


def make_experience(batch: Batch, config: RunConfig, kl_coef: float) -> tuple[Experience, int]:
    """Advantages; groups with a non-finite score, and on request those without signal, are left
    out. Returns the number of non-finite groups too. Collective."""
    rollout, view = batch.rollout, batch.view
    finite_B = torch.isfinite(view.logprobs_BR).all(1) & torch.isfinite(rollout.behavior_logprobs_BR).all(1)
    finite_B &= torch.isfinite(batch.reward.rewards_BR).all(1)  # another teacher's score
    finite_N = finite_B.view(-1, rollout.group_size).all(1)
    dropped = [rollout.prompts[n].id for n in torch.nonzero(~finite_N).flatten().tolist()]
    reward = batch.reward
    if dropped:
        log.warning("dropped %d groups with a non-finite score: %s", len(dropped), dropped)
        ok_B1 = finite_N.repeat_interleave(rollout.group_size)[:, None]
        returns = None if reward.returns_BR is None else torch.where(ok_B1, reward.returns_BR, 0.0)
        reward = replace(reward, rewards_BR=torch.where(ok_B1, reward.rewards_BR, 0.0), returns_BR=returns)
    advantages_BR, returns_BR = _advantages(batch, reward, config, kl_coef)
    experience = Experience(
        rollout, advantages_BR, batch.reference_BR, view.hidden_SD, batch.values_BR, returns_BR, batch.old_BR,
        batch.importance_BR, view.entries, batch.reference_states,
    )  # fmt: skip
    keep_N = finite_N
    if config.grpo.no_signal == "skip" and config.algo == "grpo":
        keep_N = keep_N & has_signal(batch)
    if bool(keep_N.all()):
        return experience, len(dropped)
    return experience.select(torch.nonzero(keep_N).flatten().tolist()), len(dropped)


def _advantages(
    batch: Batch, reward: RewardOutput, config: RunConfig, kl_coef: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(advantages, returns for the critic), float32 [B, R]."""
    rollout = batch.rollout
    if config.algo == "ppo" and batch.values_BR is not None:
        return ppo_advantages(
            reward, rollout.lengths_B, rollout.behavior_logprobs_BR, batch.reference_BR, batch.values_BR, config.ppo,
            kl_coef,
        )  # fmt: skip
    if RECIPES[config.recipe].quantile_reward:
        scores_B = quantile_rewards(reward.rewards_BR.sum(1), rollout.group_size)
        advantage_B = group_scores_advantage(
            scores_B, rollout.group_size, scale="none", epsilon=0.0, baseline=config.grpo.baseline
        )
        return torch.where(rollout.mask_BR, advantage_B[:, None], 0.0), None
    if rollout.group_size == 1:  # the teacher's answers: no policy gradient
        return torch.zeros_like(reward.rewards_BR), None
    return grpo_advantages(reward, rollout.lengths_B, rollout.group_size, config.grpo), None


def imitated(experience: Experience, *, best: bool) -> list[Group]:
    """What a cloning recipe imitates: the (teacher's) answer to each prompt, or the `best` of each group."""
    rollout, groups = experience.rollout, []
    for n, prompt in enumerate(rollout.prompts):
        rows = rollout.rows_of([n])
        # The advantage of every token of a response is its rank's in the group (`_advantages`).
        chosen = max(rows, key=lambda b: float(experience.advantages_BR[b, 0])) if best else rows[0]
        if rollout.responses[chosen]:
            groups.append(Group(prompt=prompt.tokens, responses=(rollout.responses[chosen],)))
    return groups
