"""Validation in the loop: every `eval.every` steps a small fixed set of questions says how good the student is.

The best checkpoint is marked and kept, and the run may end when nothing better comes (`eval.patience`). The questions
are never the held-out ones, and none that is trained on: those of `data.validation`, or a few RL prompts that are set
aside. Which steps are validated depends on the step number alone, and what was best is part of Progress, so a resumed
run decides as an unbroken one. Nothing here draws from the random numbers of training.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from configs.schema import RunConfig, require
from training import distributed
from training.collect import Models
from training.evaluation import greedy_answers, reverse_kl, score_answers
from training.experience import Prompt
from training.overlap import folded
from training.run_folder import Progress, RunFolder

log = logging.getLogger(__name__)
LOWER_IS_BETTER = ("reverse_kl",)
FILE = "eval/validation.jsonl"


@dataclass(frozen=True)
class Cut:
    """RL prompts without those that are set aside."""

    validation: list[Prompt]
    """Evenly spaced over the file."""
    prompts: list[Prompt]
    """All others, without repetitions of the above."""


def set_aside(prompts: Sequence[Prompt], heldout: Sequence[Prompt], config: RunConfig) -> Cut:
    """`eval.validation_questions` of the RL prompts, none of them a held-out question. Raises ValueError."""
    judged = {question_key(prompt) for prompt in heldout}
    needs_answers = config.eval.metric != "reverse_kl"
    fit = [p for p in prompts if question_key(p) not in judged and (p.answers or not needs_answers)]
    count = config.eval.validation_questions
    require(
        count <= len(fit) // 2, "eval.validation_questions", count,
        f"is more than half of the {len(fit)} RL prompts"
        + (f" with answers (eval.metric = {config.eval.metric!r} needs them)" if needs_answers else "")
        + "; set fewer aside, or give a file in data.validation",
    )  # fmt: skip
    chosen = [fit[len(fit) * i // count] for i in range(count)]
    taken = {question_key(prompt) for prompt in chosen}
    return Cut(chosen, [prompt for prompt in prompts if question_key(prompt) not in taken])


def check_validation(validation: Sequence[Prompt], others: dict[str, Sequence[Prompt]], config: RunConfig) -> None:
    """Questions of `data.validation` are in no other file. `others`: by key. Raises ValueError."""
    keys = {question_key(prompt): prompt for prompt in validation}
    for name, prompts in others.items():
        shared = [keys[key] for key in dict.fromkeys(question_key(prompt) for prompt in prompts) if key in keys]
        if shared:
            raise ValueError(
                f"data.validation = {config.data.validation!r}: {len(shared)} of {len(keys)} questions are in {name} "
                f"too, the first: {shared[0].question[:80]!r}; leave them out there, or leave data.validation out to "
                "have RL prompts set aside"
            )


def question_key(prompt: Prompt) -> tuple[str, str]:
    """What makes two questions one, but for case and white space."""
    return folded(prompt.question), folded(prompt.context or "")


def due(config: RunConfig, progress: Progress) -> bool:
    """Is this state of the student to be validated, and has not been?"""
    every = config.eval.every
    return every > 0 and progress.step > progress.validated_step and progress.step % every == 0


def validate(models: Models, prompts: Sequence[Prompt], config: RunConfig, progress: Progress) -> dict[str, float]:
    """Ask the questions, and bring `progress` up to date; the step's metrics. Collective."""
    found = {"reverse_kl": reverse_kl(models.actor, models.teacher, prompts, config)}
    if all(prompt.answers for prompt in prompts):
        found = score_answers(prompts, greedy_answers(models.actor, prompts, config), found["reverse_kl"]).scores()
    note(progress, found[config.eval.metric], config)
    return {f"validation/{name}": value for name, value in found.items()}


def note(progress: Progress, value: float, config: RunConfig) -> None:
    """Is this the best so far, and has there been none for too long?"""
    progress.validated_step = progress.step
    sign = -1.0 if config.eval.metric in LOWER_IS_BETTER else 1.0
    if math.isfinite(value) and (progress.best_value is None or sign * value > sign * progress.best_value):
        progress.best_value, progress.best_step = value, progress.step
    waited = (progress.step - progress.best_step) // config.eval.every
    progress.stopped_early = config.eval.patience > 0 and waited >= config.eval.patience
    if progress.stopped_early and distributed.is_main():
        log.info("stopped at step %d: validation %s was best at step %d (%s), and has not been better %d times since",
                 progress.step, config.eval.metric, progress.best_step, progress.best_value, waited)  # fmt: skip


def is_best(progress: Progress) -> bool:
    """The student as it is now is the best so far."""
    return progress.best_step == progress.step > 0


def record(folder: RunFolder, progress: Progress, metrics: dict[str, float]) -> None:
    """A line in eval/validation.jsonl, where this step was validated. Rank 0 alone."""
    found = {key.split("/", 1)[1]: value for key, value in metrics.items() if key.startswith("validation/")}
    if found:
        folder.append(FILE, {"step": progress.step, **found, "best": is_best(progress)})


def summary(config: RunConfig, progress: Progress, exported: int) -> dict[str, object]:
    """For summary.json; empty without validation."""
    if config.eval.every == 0:
        return {}
    return {
        "validation": {
            "metric": config.eval.metric, "best_step": progress.best_step, "best_value": progress.best_value,
            "stopped_early": progress.stopped_early, "exported_step": exported,
        }
    }  # fmt: skip
