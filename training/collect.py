"""From a step's prompts to what the update learns from: Rollout, Scored, Rewarded, Experience."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce

import torch

from configs.schema import RunConfig
from inference.client import TeacherLost
from rewards import REWARDS
from rewards.base import RewardInput
from rewards.combine import TeacherReward, add_parts, weighted_sum
from rewards.parts import part_weights
from rewards.tokens import sum_by_response
from training import distributed
from training.advantages import has_signal
from training.algorithms import ALGORITHMS, learns_from_groups
from training.data.order import replacement_positions, share_of_rank
from training.experience import Corpus, Experience, Prompt, Rewarded, Rollout, Scored, join, take
from training.losses import truncated_importance
from training.objective import LossWeights
from training.recipes import RECIPES
from training.run.checkpoints import Checkpoints
from training.run.run_folder import RunFolder
from training.run.safe_points import SafePoints
from training.student.actor import Actor
from training.student.critic import Critic
from training.student.reference import Reference
from training.teacher.bilingual import Bilingual
from training.teacher.link import PendingView, TeacherLink
from training.teacher.mixing import TokenMixture, importance_of, mix_responses, teacher_rollout
from training.teacher.reward_parts import configured_parts

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


@dataclass(frozen=True)
class Run:
    """A run of stage 2: everything that its steps share."""

    config: RunConfig
    models: Models
    corpus: Corpus
    folder: RunFolder
    checkpoints: Checkpoints
    points: SafePoints


@dataclass(frozen=True)
class Step:
    """One step of a run."""

    number: int
    """From 0."""
    weights: LossWeights
    """Weights of the loss terms in force: what they do not need is not asked for."""

    @classmethod
    def of(cls, run: Run, number: int = 0) -> Step:
        """Step `number` of a run."""
        same_tokenizer = run.models.teacher.facts.same_tokenizer
        return cls(number, RECIPES[run.config.recipe].weights(run.config, number, same_tokenizer))


def collect(run: Run, prompts: Sequence[Prompt], step: Step) -> Rewarded:
    """Answer the prompts; where grpo.no_signal is `resample`, answer others in place of groups that teach nothing.
    Collective."""
    config = run.config
    batch = _rewarded(run, prompts, step)
    if not (learns_from_groups(config) and config.grpo.no_signal == "resample"):
        return batch
    pool, count = run.corpus.prompts, len(prompts)
    first = config.prompts_per_step * distributed.rank() // distributed.world_size()
    for attempt in range(config.grpo.resample_rounds):
        silent = torch.nonzero(~has_signal(batch)).flatten().tolist()
        if not distributed.any_rank(bool(silent)):
            break
        # A rank without such a group answers one prompt as well, which is then not used: sampling is in step.
        slots = [first + n for n in silent] or [first]
        chosen = replacement_positions(slots, len(pool), config.seed, step.number, attempt)
        fresh = _rewarded(run, [pool[i] for i in chosen], step)
        batch = take(join(batch, fresh), [count + silent.index(n) if n in silent else n for n in range(count)])
    return batch


def _rewarded(run: Run, prompts: Sequence[Prompt], step: Step) -> Rewarded:
    rollout, asked = answer(run, prompts, step)
    return reward(run.config, score(run, rollout, step, asked), step.weights)


def answer(run: Run, prompts: Sequence[Prompt], step: Step) -> tuple[Rollout, list[PendingView]]:
    """Responses of the student, of the teacher, or of both, and what each teacher is to say of them: it is asked about
    sampling.prompts_at_once prompts while the next ones are answered. Collective."""
    at_once = run.config.sampling.prompts_at_once or len(prompts)
    # As many times on each rank, and nowhere without a prompt: sampling is in step.
    times = int(distributed.max_over_ranks(math.ceil(len(prompts) / max(at_once, 1))))
    times = max(min(times, int(-distributed.max_over_ranks(-len(prompts)))), 1)
    rollouts, asked = [], []
    for part in range(times):
        with run.points.phase("sample"):
            some = share_of_rank(prompts, part, times)
            rollouts.append(distributed.together(partial(_answer, run, some, step.number), TeacherLost))
        asked.append(_ask(run, rollouts[-1], step))
    return reduce(join, rollouts), [joined(views) for views in zip(*asked, strict=True)]


def _ask(run: Run, rollout: Rollout, step: Step) -> list[PendingView]:
    exact, entries = step.weights.single_step > 0, run.config.loss.single_step_entries
    return [
        run.models.teacher.ask(rollout, whole_distribution=exact, entries=entries),
        *(link.ask(rollout, whole_distribution=False) for link in run.models.others),
    ]


def joined(views: Sequence[PendingView]) -> PendingView:
    return lambda: reduce(join, [wait() for wait in views])


def _answer(run: Run, prompts: Sequence[Prompt], step: int) -> Rollout:
    config, actor, teacher = run.config, run.models.actor, run.models.teacher
    if RECIPES[config.recipe].teacher_answers:
        return teacher_rollout(actor, teacher, prompts, config, step)
    if config.sampling.teacher_mix == 0 or not prompts:
        return actor.sample(prompts, step=step)
    if config.sampling.mix_by == "response":
        return mix_responses(actor, teacher, actor.sample(prompts, step=step), config, step)
    mixture = TokenMixture(teacher, prompts, config.sampling)
    try:
        return actor.sample(prompts, step=step, mixture=mixture)
    finally:
        mixture.close()


def score(run: Run, rollout: Rollout, step: Step, asked: Sequence[PendingView] | None = None) -> Scored:
    """What the teachers say, while reference and critic run; `asked` is what they were asked already. Collective."""
    config, models = run.config, run.models
    asked = _ask(run, rollout, step) if asked is None else asked
    translated = models.bilingual.ask(rollout) if models.bilingual else None
    with run.points.phase("reference"):
        full_kl = config.loss.kl_estimator == "full" and step.weights.kl > 0
        reference_S = models.reference.logprobs(rollout) if models.reference else None
        reference = models.reference.states(rollout) if models.reference and full_kl else None
        start_S = models.start.logprobs(rollout) if models.start else None
        values_S = models.critic.values(rollout) if models.critic else None
        policy_S = models.actor.logprobs(rollout) if config.loss.importance_cap is not None else None
    with run.points.phase("teacher"):
        teacher, *others = distributed.together(lambda: [wait() for wait in asked], TeacherLost)
        bilingual_B = distributed.together(translated, TeacherLost) if translated else None
    importance_S = importance_of(rollout, teacher, config) if config.sampling.teacher_mix > 0 else None
    if policy_S is not None and config.loss.importance_cap is not None:
        cut_S = truncated_importance(policy_S, rollout.behavior_logprobs_S, config.loss.importance_cap)
        importance_S = cut_S if importance_S is None else importance_S * cut_S
    return Scored(
        rollout=rollout,
        teacher=teacher,
        others=tuple(others),
        bilingual_B=bilingual_B,
        policy_logprobs_S=policy_S,
        reference_logprobs_S=reference_S,
        reference=reference,
        start_logprobs_S=start_S,
        values_S=values_S,
        importance_S=importance_S,
    )


def reward(config: RunConfig, scored: Scored, weights: LossWeights) -> Rewarded:
    """The configured reward: each teacher's by its weight, and the extra parts.

    The exact single-step term, where the loss has one, is to the first teacher: the others' rewards are whole.
    """
    rollout, kind = scored.rollout, REWARDS[config.reward]
    prompts_B = rollout.prompt_of_response()
    inputs = RewardInput(
        lengths_B=rollout.lengths_B,
        finished_B=rollout.finished_B,
        behavior_logprobs_S=rollout.behavior_logprobs_S,
        teacher_logprobs_S=scored.teacher.logprobs_S,
        texts_B=rollout.texts_B,
        answers_B=[p.answers for p in prompts_B],
        questions_B=[p.text for p in prompts_B],
        group_size=rollout.group_size,
    )
    first = kind.reward(inputs, config.rewards, weights.single_step > 0)
    teachers = [TeacherReward(None, config.rewards.teacher_weight, first)]
    for teacher, view in zip(config.teachers, scored.others, strict=True):
        asked = replace(inputs, teacher_logprobs_S=view.logprobs_S)
        teachers.append(TeacherReward(teacher.name, teacher.weight, kind.reward(asked, config.rewards, False)))
    part_weight = part_weights(config.rewards)
    parts = configured_parts(inputs, config) if part_weight else {}
    if scored.bilingual_B is not None:
        parts["bilingual"] = scored.bilingual_B
    return Rewarded(scored, add_parts(weighted_sum(teachers), parts, part_weight, inputs.lengths_B))


def make_experience(run: Run, batch: Rewarded, kl_coef: float) -> tuple[Experience, int]:
    """Advantages of the groups that are learnt from: those with a non-finite score, and on request those without
    signal, are left out. Returns the number of non-finite groups too. Collective."""
    config = run.config
    algorithm, recipe = ALGORITHMS[config.algo], RECIPES[config.recipe]
    finite_N = finite_groups(batch)
    dropped = torch.nonzero(~finite_N).flatten().tolist()
    if dropped:
        ids = [batch.rollout.prompts_N[n].id or batch.rollout.prompts_N[n].index for n in dropped]
        log.warning("dropped %d groups with a non-finite score: %s", len(dropped), ids)
        batch = take(batch, torch.nonzero(finite_N).flatten().tolist())
    advantages = recipe.advantages or algorithm.advantages
    experience = Experience(batch, *advantages(batch, config, kl_coef))
    if learns_from_groups(config) and config.grpo.no_signal == "skip":
        experience = take(experience, torch.nonzero(has_signal(batch)).flatten().tolist())
    return experience, len(dropped)


def finite_groups(batch: Rewarded) -> torch.Tensor:
    """bool [N]: every score of the group is finite, each teacher's too."""
    rollout = batch.rollout
    finite_S = torch.isfinite(batch.scored.teacher.logprobs_S) & torch.isfinite(rollout.behavior_logprobs_S)
    finite_S &= torch.isfinite(batch.reward.rewards_S)
    broken_B = sum_by_response((~finite_S).float(), rollout.lengths_B)
    return (broken_B.view(-1, rollout.group_size) == 0).all(1)
