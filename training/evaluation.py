"""The trainer's own evaluation on questions: SQuAD F1, exact match and reverse KL to the teacher; on open questions,
which many answers are right to, the share of right ones among sampled answers, and how many of them differ.

Held-out questions are asked before and after a run. Every `eval.every` steps a small fixed set of other questions says
how good the student is (training/data/validation.py chooses them): the best checkpoint is marked and kept, and the run
may end when nothing better comes (`eval.patience`). Which steps are validated depends on the step number alone, and
what was best is part of Progress, so a resumed run decides as an unbroken one. Nothing here draws from the random
numbers of training.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.io.jsonl import read_questions
from configs.io.results import Result, Value, about_file, versions
from configs.schema import RunConfig
from inference.client import TeacherLost
from rewards.answers import answer_row, open_scores
from training import distributed
from training.collect import Run
from training.data.order import share_of_rank
from training.experience import Prompt
from training.run.run_folder import Progress
from training.student.actor import Actor
from training.teacher.link import TeacherLink

log = logging.getLogger(__name__)
LOWER_IS_BETTER = ("reverse_kl",)
EVALUATION_STEP = 2**40
"""Step number of evaluation samples in their seeds, so that they repeat no training sample."""


def evaluate(
    actor: Actor, link: TeacherLink | None, prompts: Sequence[Prompt], config: RunConfig, model: str
) -> Result:
    """Greedy answers for F1 and exact match, sampled ones for the reverse KL (with a teacher) and the open questions.
    `model`: what the student is called. Collective: ranks share the questions."""
    closed, open_ones = by_kind(prompts)
    kl = None if link is None else sampled_answers(actor, link, closed, config)[0]
    found = score_answers(closed, greedy_answers(actor, closed, config), config, model, kl)
    if not open_ones:
        return found
    open_kl, texts = sampled_answers(actor, link, open_ones, config)
    return with_open(found, open_ones, texts, open_kl)


def by_kind(prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """(questions with answers, open questions)."""
    return [p for p in prompts if p.pattern is None], [p for p in prompts if p.pattern is not None]


def with_open(found: Result, prompts: Sequence[Prompt], texts: Sequence[str], kl: float | None) -> Result:
    """A result with what was answered to the open questions too: as many `texts` to each prompt."""
    each = len(texts) // len(prompts)
    asked = [prompt.pattern or "" for prompt in prompts for _ in range(each)]
    values = {name: Value(value) for name, value in open_scores(asked, texts).items()}
    values |= {} if kl is None else {"open_kl": Value(kl)}
    return replace(found, values={**found.values, **values})


def greedy_answers(actor: Actor, prompts: Sequence[Prompt], config: RunConfig) -> list[str]:
    """The student's likeliest answers to all prompts, on every rank. Collective."""
    sampling = replace(config.sampling, group_size=1)
    texts: list[str] = []
    for asked, count in _shared_batches(prompts, config.eval.batch):
        texts += actor.sample(asked, step=EVALUATION_STEP, sampling=sampling, greedy=True).texts_B[:count]
    return distributed.gather_strings(list(map(actor.asked.scored, texts)))


def sampled_answers(
    actor: Actor, link: TeacherLink | None, prompts: Sequence[Prompt], config: RunConfig
) -> tuple[float | None, list[str]]:
    """eval.kl_samples answers to each prompt at temperature 1, in their order and on every rank; and over them
    KL(student || teacher) in nats a token: exact over the vocabulary at each state with equal tokenizers, else
    log pi - log p_T of the samples (a token of the student) that the teacher has room for; None without a teacher.
    Collective."""
    sampling = replace(config.sampling, group_size=config.eval.kl_samples, temperature=1.0)
    kl_sum = tokens = 0.0
    texts: list[str] = []
    for asked, count in _shared_batches(prompts, config.eval.batch):
        rollout = actor.sample(asked, step=EVALUATION_STEP, sampling=sampling)
        if link is None:
            texts += rollout.texts_B[: count * config.eval.kl_samples]
            continue
        wait = link.ask(rollout, whole_distribution=link.facts.same_tokenizer)
        view = distributed.together(wait, TeacherLost)
        if view.hidden_SD is not None:
            kl_S = actor.teacher_kl(rollout, view.hidden_SD)
        else:
            kl_S = rollout.behavior_logprobs_S - view.logprobs_S
        if count:
            known_S = ~view.logprobs_S.isnan()  # no score: what is too long for the teacher
            kl_sum += float(kl_S[known_S].double().sum())
            tokens += float(known_S.sum())
            texts += rollout.texts_B
    texts = list(map(actor.asked.scored, texts))
    if link is None:
        return None, distributed.gather_strings(texts)
    total = distributed.sum_metrics({"kl": kl_sum, "tokens": tokens})
    return total["kl"] / total["tokens"] if total["tokens"] else math.nan, distributed.gather_strings(texts)


def _shared_batches(prompts: Sequence[Prompt], batch: int) -> list[tuple[list[Prompt], int]]:
    """This rank's share in batches, with how many of each count. All ranks get the same number of batches: one that
    has run out repeats a question that does not count, because under ZeRO 3 its passes are the others' as well."""
    mine = share_of_rank(prompts, distributed.rank(), distributed.world_size())
    passes = int(distributed.max_over_ranks(-(-len(mine) // batch)))
    parts = [mine[i * batch : (i + 1) * batch] for i in range(passes)]
    return [(part or list(prompts[:1]), len(part)) for part in parts]


def evaluate_teacher(link: TeacherLink, prompts: Sequence[Prompt], config: RunConfig) -> Result:
    """The teacher's greedy and sampled answers: the upper bound. Its reverse KL to itself is 0 by definition. Call on
    one rank."""

    def answers(asked: Sequence[Prompt], temperature: float) -> list[str]:
        texts: list[str] = []
        for start in range(0, len(asked), config.eval.batch):
            batch, seed = asked[start : start + config.eval.batch], EVALUATION_STEP + start
            found = link.answer(batch, config.sampling.max_new_tokens, temperature=temperature, seed=seed)
            texts += [link.facts.teacher.scored(text) for text, _ in found]
            distributed.beat()  # the other ranks wait
        return texts

    closed, open_ones = by_kind(prompts)
    found = score_answers(closed, answers(closed, 0.0), config, config.teacher.path, 0.0)
    if not open_ones:
        return found
    repeated = [prompt for prompt in open_ones for _ in range(config.eval.kl_samples)]
    return with_open(found, open_ones, answers(repeated, 1.0), 0.0)


def score_answers(
    prompts: Sequence[Prompt],
    predictions: Sequence[str],
    config: RunConfig,
    model: str,
    distance: float | None = None,
) -> Result:
    """Values f1 and exact_match of the answers, means in percent, and reverse_kl, the `distance` where it is known."""
    rows = answer_rows(prompts, predictions)
    values = {name: Value(mean) for name, mean in means(rows).items()}
    data, student = config.data, config.student
    return Result(
        measure="heldout",
        model=model,
        data=about_file(Path(data.heldout), len(rows), len(read_questions(data.heldout))),
        settings={
            "template": data.template,
            "prompt": student.prompt,
            "system_prompt": student.system_prompt,
            "chat_template_kwargs": student.chat_template_kwargs,
            "max_new_tokens": config.sampling.max_new_tokens,
        },
        versions=versions("torch", "transformers"),
        values=values if distance is None else {**values, "reverse_kl": Value(distance)},
        rows=rows,
    )


def answer_rows(prompts: Sequence[Prompt], predictions: Sequence[str]) -> list[dict[str, Any]]:
    """Each question with its answer and what that scores."""
    return [answer_row(vars(prompt), text) for prompt, text in zip(prompts, predictions, strict=True)]


def means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """f1 and exact_match of those, in percent."""
    return {key: sum(row[key] for row in rows) / max(len(rows), 1) for key in ("f1", "exact_match")}


def validate(run: Run, progress: Progress) -> dict[str, float]:
    """Ask the validation questions, and bring `progress` up to date; the step's metrics. Collective."""
    actor, prompts, config = run.models.actor, run.corpus.validation, run.config
    found = {"reverse_kl": sampled_answers(actor, run.models.teacher, prompts, config)[0] or 0.0}
    if all(prompt.answers for prompt in prompts):
        found |= means(answer_rows(prompts, greedy_answers(actor, prompts, config)))
    note(progress, found[config.eval.metric], config)
    if distributed.is_main():
        run.folder.append("eval/validation.jsonl", {"step": progress.step, **found, "best": progress.is_best})
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
        log.info(
            "stopped at step %d: validation %s was best at step %d (%s), and has not been better %d times since",
            progress.step,
            config.eval.metric,
            progress.best_step,
            progress.best_value,
            waited,
        )


def validation_summary(config: RunConfig, progress: Progress, exported: int) -> dict[str, object]:
    """For summary.json; empty without validation."""
    if config.eval.every == 0:
        return {}
    return {
        "validation": {
            "metric": config.eval.metric,
            "best_step": progress.best_step,
            "best_value": progress.best_value,
            "stopped_early": progress.stopped_early,
            "exported_step": exported,
        }
    }
