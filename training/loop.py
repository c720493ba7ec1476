"""The loop of stage 2. One function shows a step; GRPO and PPO differ in how advantages are made."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm import tqdm

from configs.schema import RunConfig
from inference.packing import Group
from rewards.answers import exact_match
from rewards.base import RewardInput, RewardOutput, place_on_last_token
from rewards.minillm import minillm_rewards
from rewards.teacher_logprob import teacher_logprob_rewards
from training import distributed
from training.actor import Actor, Reference, UpdateInput
from training.critic import Critic
from training.data import positions_of_step, share_of_rank
from training.experience import Experience, Prompt, Rollout, TeacherView
from training.grpo import grpo_advantages
from training.ppo import next_kl_coefficient, ppo_advantages
from training.run_folder import Progress, RunFolder, step_tag
from training.stopping import StopRequest
from training.teaching import TeacherLink

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpus:
    """Everything that a step draws from; the same on every rank."""

    prompts: Sequence[Prompt]
    """RL prompts."""
    text: Sequence[Group]
    """L_PT blocks; empty where L_PT is off."""
    cloning: Sequence[Group]
    """L_BC examples; empty where L_BC is off."""


@dataclass(frozen=True)
class Models:
    """Who takes part."""

    actor: Actor
    reference: Reference | None
    critic: Critic | None
    teacher: TeacherLink


def train(
    config: RunConfig, models: Models, corpus: Corpus, folder: RunFolder, progress: Progress, stop: StopRequest
) -> str:
    """Run steps until config.steps, a stop request or too many skipped updates; returns the run's status.

    `progress` is brought up to date after each step. Collective: all ranks run it together.
    """
    actor, single_step = models.actor, single_step_coef(config, models.teacher.same_tokenizer)
    bar = tqdm(
        total=config.steps, initial=progress.step, unit="step", desc=config.run_name, disable=not distributed.is_main()
    )
    skipped_in_a_row = 0
    status = "finished"
    while progress.step < config.steps:
        step, clock = progress.step, Clock()
        prompts = _prompts_of_step(corpus, config, step)

        with clock("sample"):
            rollout = actor.sample(prompts, step=step)
        waiting = models.teacher.ask(rollout, whole_distribution=single_step > 0)
        with clock("reference"):
            reference_BR = models.reference.logprobs(rollout) if models.reference else None
            values_BR = models.critic.values(rollout) if models.critic else None
        with clock("teacher"):
            view = waiting()
        reward = reward_of(rollout, view, config, single_step > 0)
        experience = _experience(rollout, view, reward, reference_BR, values_BR, config, progress.kl_coef)
        with clock("update"):
            metrics = _update(models, experience, corpus, config, step, single_step)

        skipped_in_a_row = skipped_in_a_row + 1 if metrics["skipped"] else 0
        metrics |= _describe(rollout, view, reward, experience)
        metrics |= clock.finish()
        _advance(progress, metrics, config, len(prompts))
        if distributed.is_main():
            _record(folder, step, metrics, rollout, view, reward, config, bar)
        stopping = distributed.any_rank(stop.requested)
        gave_up = skipped_in_a_row >= config.actor.max_skipped
        if stopping or gave_up or progress.step % config.checkpoint.every == 0 or progress.step == config.steps:
            save_checkpoint(models, folder, progress, config)
        if gave_up:
            status = "failed"
            log.error("%d updates in a row had a non-finite loss or score; stopped with a checkpoint", skipped_in_a_row)
            break
        if stopping and progress.step < config.steps:
            status = "stopped"
            break
    bar.close()
    return status


def single_step_coef(config: RunConfig, same_tokenizer: bool) -> float:
    """lambda_1 with its default resolved. Raises ValueError where it is asked for but cannot be had."""
    asked = config.loss.single_step_coef
    if asked and not same_tokenizer:
        raise ValueError(
            f"loss.single_step_coef = {asked}: the exact single-step KL compares whole vocabularies, and student and "
            "teacher have different tokenizers; set it to 0 or leave it out"
        )
    if asked is None:
        return 1.0 if config.reward == "minillm" and same_tokenizer else 0.0
    return asked


def reward_of(rollout: Rollout, view: TeacherView, config: RunConfig, single_step: bool) -> RewardOutput:
    """The configured reward of a rollout, with its extra parts added."""
    inputs = RewardInput(
        lengths_B=rollout.lengths_B,
        finished_B=rollout.finished_B,
        behavior_logprobs_BR=rollout.behavior_logprobs_BR,
        teacher_logprobs_BR=view.logprobs_BR,
        texts=rollout.texts,
        answers=[p.answers for p in rollout.prompts for _ in range(rollout.group_size)],
    )
    if config.reward == "minillm":
        reward = minillm_rewards(
            inputs,
            gamma=config.rewards.gamma,
            length_normalize=config.rewards.length_normalize,
            single_step=single_step,
        )
    else:
        reward = teacher_logprob_rewards(inputs, length_alpha=config.rewards.length_alpha)
    weight = config.rewards.exact_match_weight
    if weight == 0:
        return reward
    right_B = torch.tensor(
        [
            exact_match(text, answers) if answers else 0.0
            for text, answers in zip(inputs.texts, inputs.answers, strict=True)
        ]
    )
    extra_BR = weight * place_on_last_token(right_B, inputs.lengths_B, reward.rewards_BR.shape[1])
    returns_BR = reward.returns_BR
    if returns_BR is not None:
        returns_BR = returns_BR + torch.where(inputs.mask_BR, weight * right_B[:, None], 0.0)
    return RewardOutput(reward.rewards_BR + extra_BR, returns_BR, {**reward.parts, "exact_match": right_B})


def _prompts_of_step(corpus: Corpus, config: RunConfig, step: int) -> list[Prompt]:
    """This rank's prompts of a step."""
    chosen = positions_of_step(step, config.prompts_per_step, len(corpus.prompts), config.seed)
    mine = share_of_rank(chosen, distributed.rank(), distributed.world_size())
    return [corpus.prompts[i] for i in mine]


def _groups_of_step(groups: Sequence[Group], count: int, step: int, seed: int) -> list[Group]:
    """This rank's share of `count` text blocks or examples."""
    if not groups:
        return []
    chosen = positions_of_step(step, count, len(groups), seed)
    return [groups[i] for i in share_of_rank(chosen, distributed.rank(), distributed.world_size())]


def _experience(
    rollout: Rollout, view: TeacherView, reward: RewardOutput, reference_BR: torch.Tensor | None,
    values_BR: torch.Tensor | None, config: RunConfig, kl_coef: float,
) -> Experience:  # fmt: skip
    """Advantages, and groups with a non-finite score left out. Collective."""
    finite_B = torch.isfinite(view.logprobs_BR).all(1) & torch.isfinite(rollout.behavior_logprobs_BR).all(1)
    finite_N = finite_B.view(-1, rollout.group_size).all(1)
    keep = torch.nonzero(finite_N).squeeze(1).tolist()
    if len(keep) < len(finite_N):
        rows = rollout.rows_of(keep)
        log.warning("dropped %d groups with a non-finite score: %s", len(finite_N) - len(keep),
                    [rollout.prompts[n].id for n in torch.nonzero(~finite_N).squeeze(1).tolist()])  # fmt: skip
        ok_B = torch.zeros(len(finite_B), dtype=torch.bool)
        ok_B[rows] = True
        clean = torch.where(ok_B[:, None], reward.rewards_BR, 0.0)
        returns = None if reward.returns_BR is None else torch.where(ok_B[:, None], reward.returns_BR, 0.0)
        reward = replace(reward, rewards_BR=clean, returns_BR=returns)
    returns_BR = None
    if config.algo == "ppo":
        assert values_BR is not None
        advantages_BR, returns_BR = ppo_advantages(
            reward, rollout.lengths_B, rollout.behavior_logprobs_BR, reference_BR, values_BR, config.ppo, kl_coef
        )
    else:
        advantages_BR = grpo_advantages(reward, rollout.lengths_B, rollout.group_size, config.grpo)
    experience = Experience(rollout, advantages_BR, reference_BR, view.hidden_SD, values_BR, returns_BR)
    return experience if len(keep) == len(finite_N) else experience.select(keep)


def _update(
    models: Models, experience: Experience, corpus: Corpus, config: RunConfig, step: int, single_step: float
) -> dict[str, float]:
    """All optimizer steps on one rollout. Collective."""
    parts = config.actor.updates_per_rollout
    count = len(experience.rollout.prompts)
    minis = [experience.select(range(count * i // parts, count * (i + 1) // parts)) for i in range(parts)]
    metrics: dict[str, float] = {}
    if models.critic is not None:
        metrics |= models.critic.update(minis, step)
    if models.critic is not None and step < config.critic.warmup_steps:
        return {**metrics, "skipped": 0.0}
    batches = [
        UpdateInput(
            experience=mini,
            text=_groups_of_step(corpus.text, config.loss.pt_batch, step * parts + i, config.seed),
            cloning=_groups_of_step(corpus.cloning, config.loss.bc_batch, step * parts + i, config.seed),
            single_step_coef=single_step,
        )
        for i, mini in enumerate(minis)
    ]
    return metrics | models.actor.update(batches, step)


def _describe(rollout: Rollout, view: TeacherView, reward: RewardOutput, experience: Experience) -> dict[str, float]:
    """Numbers of a step that do not come from the update, over all ranks. Collective."""
    lengths_B = rollout.lengths_B
    gap_BR = rollout.behavior_logprobs_BR - view.logprobs_BR
    sums = distributed.sum_metrics(
        {
            "responses": float(len(lengths_B)),
            "tokens": float(lengths_B.sum()),
            "finished": float(rollout.finished_B.sum()),
            "scored": float(view.scored_tokens),
            "dropped": float(len(rollout.prompts) - len(experience.rollout.prompts)),
            "kl": float(torch.where(rollout.mask_BR, gap_BR, 0.0).nan_to_num().sum()),
            "reward": float(reward.rewards_BR.nan_to_num().sum()),
            **{f"part/{k}": float(v.nan_to_num().sum()) for k, v in reward.parts.items()},
        }
    )
    responses, tokens = max(sums["responses"], 1.0), max(sums["tokens"], 1.0)
    return {
        "reward/mean": sums["reward"] / responses,
        **{f"reward/{k}": sums[f"part/{k}"] / responses for k in reward.parts},
        "kl/teacher": sums["kl"] / tokens,
        "length/mean": sums["tokens"] / responses,
        "length/finished_share": sums["finished"] / responses,
        "groups/dropped": sums["dropped"],
        "tokens/sampled": sums["tokens"],
        "tokens/scored": sums["scored"],
    }


def _advance(progress: Progress, metrics: dict[str, float], config: RunConfig, prompts: int) -> None:
    """Count the step in."""
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


def _record(
    folder: RunFolder, step: int, metrics: dict[str, float], rollout: Rollout, view: TeacherView, reward: RewardOutput,
    config: RunConfig, bar: Any,
) -> None:  # fmt: skip
    """Write the step's line, now and then some samples, and move the bar."""
    metrics["tokens_per_second"] = metrics["tokens/sampled"] / max(metrics["seconds/total"], 1e-9)
    folder.append_metrics({"step": step + 1, **metrics})
    parts = {**reward.parts, "teacher": view.logprobs_BR.sum(1)}
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


def save_checkpoint(models: Models, folder: RunFolder, progress: Progress, config: RunConfig) -> None:
    """Model and optimizer states of all ranks, then progress, then `latest`. Collective."""
    tag = step_tag(progress.step)
    models.actor.engine.save(folder.checkpoints, tag)
    if models.critic is not None:
        models.critic.engine.save(folder.checkpoints / tag, "critic")
    distributed.barrier()
    if distributed.is_main():
        folder.save_progress(tag, progress)
        folder.prune(config.checkpoint.keep)
    distributed.barrier()


def resume(models: Models, folder: RunFolder) -> Progress | None:
    """Load the newest checkpoint into the models; None where there is none. Collective."""
    found = folder.latest()
    if found is None:
        return None
    tag, progress = found
    models.actor.engine.load(folder.checkpoints, tag)
    if models.critic is not None:
        models.critic.engine.load(folder.checkpoints / tag, "critic")
    if distributed.is_main():
        folder.forget_after(progress.step)
    distributed.barrier()
    return progress


class Clock:
    """Seconds by phase within one step."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._phases: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._phases[f"seconds/{phase}"] = time.perf_counter() - start

    def finish(self) -> dict[str, float]:
        """All phases and the total."""
        return {**self._phases, "seconds/total": time.perf_counter() - self._start}
