"""The loop of stage 2. One function shows a step; GRPO and PPO differ in how advantages are made."""

from __future__ import annotations

import logging
from typing import Any

from tqdm import tqdm

from configs.schema import RunConfig
from rewards.tokens import sum_by_response
from training import distributed
from training.advantages import has_signal
from training.algorithms import ALGORITHMS
from training.collect import Models, Run, Step, collect, make_experience
from training.data.order import items_of_step
from training.data.text import flat
from training.evaluation import validate
from training.experience import Experience, Rewarded, take
from training.losses import k3
from training.objective import SUPERVISED, UpdateInput
from training.recipes import RECIPES
from training.run.checkpoints import Saveable
from training.run.run_folder import Progress
from training.run.safe_points import StepAbandoned, nothing

log = logging.getLogger(__name__)


def train(run: Run, progress: Progress) -> str:
    """Run steps until config.steps, a reason to leave (`run.points`) or too many skipped updates; the run's status.

    `progress` is brought up to date after each step. Collective: all ranks run it together.
    """
    config, models, points = run.config, run.models, run.points
    bar = tqdm(
        total=config.steps,
        initial=progress.step,
        unit="step",
        desc=run.folder.path.name,
        disable=not distributed.is_main(),
    )
    skipped_in_a_row = 0
    status = "finished"
    if progress.best_step > 0:  # the run may have been killed between a checkpoint and its mark
        run.checkpoints.mark_best(progress.best_step)
    while progress.step < config.steps and not progress.ends_early:
        points.begin(progress.step)
        step = Step.of(run, progress.step)

        try:
            prompts = items_of_step(run.corpus.prompts, config.prompts_per_step, step.number, config.seed)
            batch = collect(run, prompts, step)
            experience, dropped = make_experience(run, batch, progress.kl_coef)
            with points.phase("update"):
                metrics = update(run, experience, step)
                metrics |= _supervised_phase(run, step)
        except StepAbandoned:  # the models are as the step before left them
            points.close()
            log.info("left step %d before it changed anything (%s)", step.number + 1, points.reason)
            if step.number > 0:
                save_checkpoint(run, progress)
            status = "stopped"
            break
        points.close()
        if models.reference is not None:
            models.reference.follow(models.actor, step.number)

        metrics |= describe(batch, dropped)
        if metrics["groups/dropped"] > 0 and "loss/total" not in metrics:  # no score was finite
            metrics["skipped"] = 1.0
        skipped_in_a_row = skipped_in_a_row + 1 if metrics["skipped"] else 0
        metrics |= points.seconds()
        _advance(progress, metrics, config)
        if progress.validation_due(config.eval.every):
            points.enter("validation")
            metrics |= validate(run, progress)
        if distributed.is_main():
            _record(run, progress, batch, metrics, bar)
        stopping = points.after_step()
        gave_up = skipped_in_a_row >= config.actor.max_skipped
        due = progress.step % config.checkpoint.every == 0 or progress.step == config.steps
        if due or progress.is_best or stopping or gave_up or progress.ends_early:
            save_checkpoint(run, progress)
        if gave_up:
            status = "failed"
            log.error("%d updates in a row had a non-finite loss or score; stopped with a checkpoint", skipped_in_a_row)
            break
        if stopping:
            status = "stopped"
            break
    with run.checkpoints.tolerated():
        run.checkpoints.wait()
    bar.close()
    return status


def update(run: Run, experience: Experience, step: Step) -> dict[str, float]:
    """All optimizer steps on one batch of samples. Collective. Raises StepAbandoned before the first one."""
    config, models = run.config, run.models
    parts, between = config.actor.updates_per_rollout, run.points.check
    count = len(experience.rollout.prompts_N)
    minis = [take(experience, range(count * i // parts, count * (i + 1) // parts)) for i in range(parts)]
    metrics: dict[str, float] = {}
    if models.critic is not None:
        metrics |= models.critic.update(minis, step.number, between=between)
        between = nothing  # a critic has changed: the step has to be finished
    batches, imitated = [], RECIPES[config.recipe].imitated  # the recipe's own choice, else the warm-up answers
    for i, mini in enumerate(minis):
        number, most = step.number * parts + i, config.loss.pt_batch
        text = flat(items_of_step(run.corpus.text, min(most, len(run.corpus.text)), number, config.seed))
        warmup = items_of_step(run.corpus.cloning, most, number, config.seed)
        batches.append(UpdateInput(mini, text, imitated(mini) if imitated else warmup, step.weights))
    every = config.loss.gradient_shares_every
    shares = every > 0 and step.number % every == 0
    return metrics | models.actor.update(batches, step.number, shares=shares, between=between)


def _supervised_phase(run: Run, step: Step) -> dict[str, float]:
    """Between stretches of reinforcement learning, some steps on the warm-up answers (phases.every). Collective."""
    config, count = run.config, run.config.phases.steps
    every = config.phases.every
    if every == 0 or (step.number + 1) % every != 0:
        return {}
    first = (step.number + 1) // every * count
    number = (step.number + 1) * config.actor.updates_per_rollout - 1  # of the update before: its learning rate
    losses = []
    for i in range(count):
        examples = items_of_step(run.corpus.cloning, config.sft.batch, first + i, config.seed + 1)
        batch = UpdateInput(None, [], examples, SUPERVISED)
        losses.append(run.models.actor.update([batch], number)["loss/bc"])
    return {"loss/supervised_phase": sum(losses) / count}


def describe(batch: Rewarded, dropped: int) -> dict[str, float]:
    """Numbers of a step that do not come from the update, over all ranks. Collective."""
    scored, rollout, reward = batch.scored, batch.rollout, batch.reward
    importance_S, lengths_B = scored.importance_S, rollout.lengths_B
    by_response = {
        "reward/mean": sum_by_response(reward.rewards_S, lengths_B),
        **{f"reward/{name}": part_B for name, part_B in reward.parts_B.items()},
        "length/mean": lengths_B,
        "length/finished_share": rollout.finished_B,
    }
    by_token = {"kl/teacher": rollout.behavior_logprobs_S - scored.teacher.logprobs_S}
    if scored.start_logprobs_S is not None:
        k3_S = k3(rollout.behavior_logprobs_S, scored.start_logprobs_S)
        by_token["kl/start"] = k3_S if importance_S is None else k3_S * importance_S
    if importance_S is not None:
        by_token["importance/mean"] = importance_S
    counted = {
        "groups/without_signal": ~has_signal(batch),
        "tokens/sampled": lengths_B,
        "tokens/scored": scored.teacher.scored_tokens_B,
        "tokens/unread": scored.teacher.unread_tokens_B,
    }
    # A mean is over what is known: a group whose score is not finite is left out of the update too.
    known = {name: values[values.isfinite()] for name, values in {**by_response, **by_token}.items()}
    totals = {name: float(values.sum()) for name, values in {**known, **counted}.items()}
    sizes = {f"{name} counted": len(values) for name, values in known.items()}
    sums = distributed.sum_metrics({**totals, "groups/dropped": dropped, **sizes})
    per = {name: max(sums.pop(f"{name} counted"), 1.0) for name in known}
    return {name: total / per.get(name, 1.0) for name, total in sums.items()}


def _advance(progress: Progress, metrics: dict[str, float], config: RunConfig) -> None:
    """Count the step in, and steer what is steered by it."""
    progress.step += 1
    progress.skipped_updates += int(metrics["skipped"] > 0)
    for phase in ("total", "sample", "teacher", "reference", "update"):
        progress.seconds[phase] = progress.seconds.get(phase, 0.0) + metrics[f"seconds/{phase}"]
    for kind in ("sampled", "scored"):
        progress.tokens[kind] = progress.tokens.get(kind, 0) + int(metrics[f"tokens/{kind}"])
    progress.kl_coef = ALGORITHMS[config.algo].after_step(metrics, config, progress.kl_coef)
    limit, distance = config.reference.kl_limit, metrics.get("kl/start")
    if limit is not None and distance is not None and distance > limit:
        progress.kl_limit_reached = True
        said = "stopped at step %d: KL to the start of the run is %.3f nats a token, reference.kl_limit = %s"
        log.warning(said, progress.step, distance, limit)


def _record(run: Run, progress: Progress, batch: Rewarded, metrics: dict[str, float], bar: Any) -> None:
    """Write the line of the step that was just done, now and then some samples, and move the bar."""
    step, rollout = progress.step - 1, batch.rollout
    metrics["tokens_per_second"] = metrics["tokens/sampled"] / max(metrics["seconds/total"], 1e-9)
    run.folder.append_metrics({"step": step + 1, **metrics})
    if step % run.config.checkpoint.samples_every == 0:
        teacher_B = sum_by_response(batch.scored.teacher.logprobs_S, rollout.lengths_B)
        parts = {**batch.reward.parts_B, "teacher": teacher_B}
        for n in range(min(len(rollout.prompts_N), 4)):
            rows = range(n * rollout.group_size, (n + 1) * rollout.group_size)
            sample = {
                "step": step + 1,
                "prompt": rollout.prompts_N[n].text,
                "responses": [rollout.texts_B[b] for b in rows],
                "rewards": {k: [round(float(v[b]), 4) for b in rows] for k, v in parts.items()},
            }
            run.folder.append("samples.jsonl", sample)
    bar.set_postfix(
        reward=f"{metrics['reward/mean']:.2f}",
        kl=f"{metrics['kl/teacher']:.2f}",
        length=f"{metrics['length/mean']:.1f}",
        tok_s=f"{metrics['tokens_per_second']:.0f}",
        refresh=False,
    )
    bar.update()


def save_checkpoint(run: Run, progress: Progress) -> None:
    """A checkpoint, as a phase of its own; the best student's is marked. One that cannot be written raises
    CheckpointFailed on every rank, or is left out with a warning (checkpoint.on_error). Collective."""
    run.points.enter("checkpoint")
    with run.checkpoints.tolerated():
        distributed.together(run.folder.finish_lines, OSError)
        run.checkpoints.save(saved_parts(run.models), progress)
        if progress.is_best:
            distributed.together(lambda: run.checkpoints.mark_best(progress.step), OSError)
    run.points.limit.checkpoint_s = run.checkpoints.seconds


def saved_parts(models: Models) -> dict[str, Saveable]:
    """What a checkpoint holds besides Progress, by the name of its folder."""
    parts: dict[str, Saveable | None] = {
        "student": models.actor.engine,
        "critic": None if models.critic is None else models.critic.engine,
        "reference": models.reference,
    }
    return {name: part for name, part in parts.items() if part is not None}
