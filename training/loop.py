"""The loop of stage 2. One function shows a step; GRPO and PPO differ in how advantages are made."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from configs.schema import RunConfig
from inference.packing import Group
from training import distributed, validation
from training.batch import Batch, has_signal
from training.checkpoints import Checkpoints, Saveable
from training.clock import Clock
from training.collect import Models, collect, imitated, make_experience
from training.composite import SUPERVISED, LossWeights, UpdateInput
from training.data import positions_of_step, share_of_rank
from training.experience import Experience, Prompt
from training.ppo import next_kl_coefficient
from training.recipes import RECIPES
from training.run_folder import Progress, RunFolder
from training.safe_points import SafePoints, StepAbandoned, nothing
from training.text import flat

Item = TypeVar("Item")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpus:
    """Everything that a step draws from; the same on every rank."""

    prompts: Sequence[Prompt]
    """RL prompts."""
    text: Sequence[Sequence[Group]]
    """L_PT blocks, each as the groups that it is packed from (training/text.py); empty where L_PT is off."""
    cloning: Sequence[Group]
    """L_BC examples; empty where L_BC is off."""
    validation: Sequence[Prompt] = ()
    """Questions of the validation in the loop; empty where that is off."""


def train(
    config: RunConfig, models: Models, corpus: Corpus, folder: RunFolder, checkpoints: Checkpoints, progress: Progress,
    points: SafePoints,
) -> str:  # fmt: skip
    """Run steps until config.steps, a reason to leave (`points`) or too many skipped updates; returns the run's status.

    `progress` is brought up to date after each step. Collective: all ranks run it together.
    """
    recipe = RECIPES[config.recipe]
    bar = tqdm(
        total=config.steps, initial=progress.step, unit="step", desc=config.run_name, disable=not distributed.is_main()
    )
    skipped_in_a_row = 0
    status = "finished"
    if progress.best_step > 0:  # the run may have been killed between a checkpoint and its mark
        checkpoints.mark_best(progress.best_step)
    while progress.step < config.steps and not (progress.kl_limit_reached or progress.stopped_early):
        step, clock = progress.step, Clock(points.phase)
        points.begin(step)
        weights = recipe.weights(config, step, models.teacher.same_tokenizer)
        prompts = prompts_of_step(corpus, config, step)

        try:
            batch = collect(models, config, prompts, corpus.prompts, step, weights, clock)
            experience, dropped = make_experience(batch, config, progress.kl_coef)
            with clock("update"):
                metrics = update(models, experience, corpus, config, progress, weights, points)
                metrics |= _supervised_phase(models, corpus, config, progress)
        except StepAbandoned:  # the models are as the step before left them
            points.close()
            log.info("left step %d before it changed anything (%s)", step + 1, points.reason)
            if step > 0:
                save_checkpoint(models, folder, checkpoints, progress, config, points)
            status = "stopped"
            break
        points.close()
        if models.reference is not None:
            models.reference.follow(models.actor, step)

        skipped_in_a_row = skipped_in_a_row + 1 if metrics["skipped"] else 0
        metrics |= describe(batch, experience, dropped)
        metrics |= clock.finish()
        _advance(progress, metrics, config)
        if validation.due(config, progress):
            points.enter("validation")
            metrics |= validation.validate(models, corpus.validation, config, progress)
        if distributed.is_main():
            _record(folder, step, metrics, batch, config, bar)
            validation.record(folder, progress, metrics)
        stopping = points.after_step(metrics["seconds/total"])
        gave_up = skipped_in_a_row >= config.actor.max_skipped
        due = progress.step % config.checkpoint.every == 0 or progress.step == config.steps
        best = validation.is_best(progress)
        if due or best or stopping or gave_up or progress.kl_limit_reached or progress.stopped_early:
            save_checkpoint(models, folder, checkpoints, progress, config, points, best=best)
        if gave_up:
            status = "failed"
            log.error("%d updates in a row had a non-finite loss or score; stopped with a checkpoint", skipped_in_a_row)
            break
        if progress.kl_limit_reached:
            log.warning("stopped at step %d: KL to the start of the run is %.3f nats a token, reference.kl_limit = %s",
                        progress.step, metrics["kl/start"], config.reference.kl_limit)  # fmt: skip
        if stopping and progress.step < config.steps:
            status = "stopped"
            break
    with checkpoints.tolerated():
        checkpoints.wait()
    bar.close()
    return status


def prompts_of_step(corpus: Corpus, config: RunConfig, step: int) -> list[Prompt]:
    """This rank's prompts of a step."""
    chosen = positions_of_step(step, config.prompts_per_step, len(corpus.prompts), config.seed)
    mine = share_of_rank(chosen, distributed.rank(), distributed.world_size())
    return [corpus.prompts[i] for i in mine]


def _groups_of_step(groups: Sequence[Item], count: int, step: int, seed: int) -> list[Item]:
    """This rank's share of `count` text blocks or examples."""
    if not groups:
        return []
    chosen = positions_of_step(step, count, len(groups), seed)
    return [groups[i] for i in share_of_rank(chosen, distributed.rank(), distributed.world_size())]


def update(
    models: Models, experience: Experience, corpus: Corpus, config: RunConfig, progress: Progress, weights: LossWeights,
    points: SafePoints | None = None,
) -> dict[str, float]:  # fmt: skip
    """All optimizer steps on one batch of samples. Collective. With `points`, StepAbandoned before the first one."""
    between = nothing if points is None else points.check
    step, parts = progress.step, config.actor.updates_per_rollout
    count = len(experience.rollout.prompts)
    minis = [experience.select(range(count * i // parts, count * (i + 1) // parts)) for i in range(parts)]
    metrics: dict[str, float] = {}
    if models.critic is not None:
        metrics |= models.critic.update(minis, step, between=between)
        between = nothing  # a critic has changed: the step has to be finished
        if step < config.critic.warmup_steps:
            return {**metrics, "skipped": 0.0}
    batches = [
        UpdateInput(
            experience=mini,
            text=flat(_groups_of_step(corpus.text, config.loss.pt_batch, step * parts + i, config.seed)),
            cloning=_cloning(mini, corpus, config, step * parts + i),
            weights=weights,
        )
        for i, mini in enumerate(minis)
    ]
    every = config.loss.gradient_shares_every
    shares = every > 0 and step % every == 0
    return metrics | models.actor.update(
        batches, step, rate_factor=progress.rate_factor, shares=shares, between=between
    )


def _cloning(experience: Experience, corpus: Corpus, config: RunConfig, update: int) -> list[Group]:
    """What this update imitates: the recipe's own choice, else the warm-up answers."""
    recipe = RECIPES[config.recipe]
    if recipe.cloning:
        return imitated(experience, best=not recipe.teacher_answers)
    return _groups_of_step(corpus.cloning, config.loss.bc_batch, update, config.seed)


def _supervised_phase(models: Models, corpus: Corpus, config: RunConfig, progress: Progress) -> dict[str, float]:
    """Between stretches of reinforcement learning, some steps on the warm-up answers (phases.every). Collective."""
    every, count = config.phases.every, config.phases.steps
    if every == 0 or (progress.step + 1) % every != 0:
        return {}
    first = (progress.step + 1) // every * count
    batches = [
        UpdateInput(None, [], _groups_of_step(corpus.cloning, config.sft.batch, first + i, config.seed + 1), SUPERVISED)
        for i in range(count)
    ]
    losses = [
        models.actor.update([batch], progress.step, rate_factor=progress.rate_factor)["loss/bc"] for batch in batches
    ]
    return {"loss/supervised_phase": sum(losses) / count}


def describe(batch: Batch, experience: Experience, dropped: int) -> dict[str, float]:
    """Numbers of a step that do not come from the update, over all ranks. Collective."""
    rollout, view, reward = batch.rollout, batch.view, batch.reward
    lengths_B, start_BR, importance_BR = rollout.lengths_B, batch.start_BR, batch.importance_BR
    gap_BR = rollout.behavior_logprobs_BR - view.logprobs_BR
    sums = {
        "responses": float(len(lengths_B)),
        "tokens": float(lengths_B.sum()),
        "finished": float(rollout.finished_B.sum()),
        "scored": float(view.scored_tokens),
        "unread": float(view.unread_tokens),
        "dropped": float(dropped),
        "silent": float((~has_signal(batch)).sum()),
        "kl": float(torch.where(rollout.mask_BR, gap_BR, 0.0).nan_to_num().sum()),
        "reward": float(reward.rewards_BR.nan_to_num().sum()),
        **{f"part/{k}": float(v.nan_to_num().sum()) for k, v in reward.parts.items()},
    }
    if start_BR is not None:
        moved_BR = start_BR - rollout.behavior_logprobs_BR
        k3_BR = torch.where(rollout.mask_BR, moved_BR.exp() - 1 - moved_BR, 0.0)
        sums["start"] = float((k3_BR if importance_BR is None else k3_BR * importance_BR).nan_to_num().sum())
    if importance_BR is not None:
        sums["importance"] = float(importance_BR.nan_to_num().sum())
    sums = distributed.sum_metrics(sums)
    responses, tokens = max(sums["responses"], 1.0), max(sums["tokens"], 1.0)
    extra = {"kl/start": "start", "importance/mean": "importance"}
    return {
        "reward/mean": sums["reward"] / responses,
        **{f"reward/{k}": sums[f"part/{k}"] / responses for k in reward.parts},
        "kl/teacher": sums["kl"] / tokens,
        **{name: sums[key] / tokens for name, key in extra.items() if key in sums},
        "length/mean": sums["tokens"] / responses,
        "length/finished_share": sums["finished"] / responses,
        "groups/dropped": sums["dropped"],
        "groups/without_signal": sums["silent"],
        "tokens/sampled": sums["tokens"],
        "tokens/scored": sums["scored"],
        "tokens/unread": sums["unread"],
    }


def _advance(progress: Progress, metrics: dict[str, float], config: RunConfig) -> None:
    """Count the step in, and steer what is steered by it."""
    progress.step += 1
    progress.skipped_updates += int(metrics["skipped"] > 0)
    for phase in ("total", "sample", "teacher", "reference", "update"):
        progress.seconds[phase] = progress.seconds.get(phase, 0.0) + metrics[f"seconds/{phase}"]
    for kind in ("sampled", "scored"):
        progress.tokens[kind] = progress.tokens.get(kind, 0) + int(metrics[f"tokens/{kind}"])
    if config.algo == "ppo" and "kl/reference" in metrics:
        responses = config.prompts_per_step * config.sampling.group_size
        metrics["ppo/kl_coef"] = progress.kl_coef
        progress.kl_coef = next_kl_coefficient(progress.kl_coef, metrics["kl/reference"], config.ppo, responses)
    limit, distance = config.reference.kl_limit, metrics.get("kl/start")
    if limit is None or distance is None:
        return
    if config.reference.kl_action == "back_off":
        metrics["learning_rate/factor"] = progress.rate_factor
        progress.rate_factor = progress.rate_factor / 2 if distance > limit else min(2 * progress.rate_factor, 1.0)
    else:
        progress.kl_limit_reached = distance > limit


def _record(folder: RunFolder, step: int, metrics: dict[str, float], batch: Batch, config: RunConfig, bar: Any) -> None:
    """Write the step's line, now and then some samples, and move the bar."""
    rollout = batch.rollout
    metrics["tokens_per_second"] = metrics["tokens/sampled"] / max(metrics["seconds/total"], 1e-9)
    folder.append_metrics({"step": step + 1, **metrics})
    parts = {**batch.reward.parts, "teacher": batch.view.logprobs_BR.sum(1)}
    if step % config.checkpoint.samples_every == 0:
        for n in range(min(len(rollout.prompts), 4)):
            rows = rollout.rows_of([n])
            folder.append(
                "samples.jsonl",
                {
                    "step": step + 1,
                    "prompt": rollout.prompts[n].text,
                    "responses": [rollout.texts[b] for b in rows],
                    "rewards": {k: [round(float(v[b]), 4) for b in rows] for k, v in parts.items()},
                },
            )
    bar.set_postfix(
        reward=f"{metrics['reward/mean']:.2f}",
        kl=f"{metrics['kl/teacher']:.2f}",
        length=f"{metrics['length/mean']:.1f}",
        tok_s=f"{metrics['tokens_per_second']:.0f}",
        refresh=False,
    )
    bar.update()


def save_checkpoint(
    models: Models, folder: RunFolder, checkpoints: Checkpoints, progress: Progress, config: RunConfig,
    points: SafePoints, *, best: bool = False,
) -> None:  # fmt: skip
    """A checkpoint, as a phase of its own; the best one is marked. One that cannot be written raises CheckpointFailed
    on every rank, or is left out with a warning (checkpoint.on_error). Collective."""
    points.enter("checkpoint")
    with checkpoints.tolerated():
        distributed.together(folder.finish_lines, OSError)
        checkpoints.save(saved_parts(models), progress)
        if best:
            distributed.together(lambda: checkpoints.mark_best(progress.step), OSError)
    points.limit.took_checkpoint(checkpoints.seconds)


def saved_parts(models: Models) -> dict[str, Saveable]:
    """What a checkpoint holds besides Progress, by the name of its folder."""
    parts: dict[str, Saveable | None] = {
        "student": models.actor.engine,
        "critic": None if models.critic is None else models.critic.engine,
        "reference": models.reference,
    }
    return {name: part for name, part in parts.items() if part is not None}
