"""Open questions, each with many right answers: how many sampled answers are right, and how many right ones differ.

    python eval/heldout.py --model DIR        asks the run's own, as the run did
    python eval/measure.py open_questions --model DIR --data open.jsonl

A question has a `pattern`, a regular expression that matches the right answers and nothing else (docs/data.md).
Questions with the same pattern ask for the same answers, so a right answer counts as different once for all of them.

Result (open_questions.json): values open_right and open_different, in percent of all answers, with intervals over the
patterns; a row for each pattern: {id (of its first question), questions, answers, right, different}, the last two
are counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from configs.io.jsonl import read_open_questions
from configs.io.results import Result
from configs.ranges import PositiveInt
from eval.measures.heldout import HeldoutSettings, Question, answers, described, fitting_prompts
from eval.measures.intervals import Examples, interval
from eval.measures.model import Model
from rewards.answers import right_answers


@dataclass(frozen=True, kw_only=True)
class OpenSettings(HeldoutSettings):
    """As for questions with one answer; `data`: JSONL with question and pattern in each row."""

    samples: PositiveInt = 4
    """Answers to each question, sampled at temperature 1."""
    seed: int = 0
    """Seed of the samples."""


def open_questions(model: Model, settings: OpenSettings) -> Result:
    """Every question that fits, answered `samples` times. Raises ValueError where none fits."""
    import torch

    questions = read_open_questions(settings.data)
    prompts = fitting_prompts(model, questions, settings)
    kept = list(prompts)[: settings.questions]
    torch.manual_seed(settings.seed)
    asked = [prompts[index] for index in kept for _ in range(settings.samples)]
    texts = answers(model, asked, settings, sampled=True)
    rows = _by_pattern([questions[index] for index in kept], texts, settings.samples)
    values = {f"open_{key}": interval(shares(rows, key)) for key in ("right", "different")}
    asked_of = described(model, settings, len(kept), len(questions) - len(prompts), questions)
    return Result(measure="open_questions", values=values, rows=rows, **asked_of)


def _by_pattern(questions: Sequence[Question], texts: Sequence[str], samples: int) -> list[Question]:
    """A row for each pattern, of the questions that have it and the answers to them (`samples` to each question)."""
    rows: dict[str, Question] = {}
    for place, one in enumerate(questions):
        row = rows.setdefault(one["pattern"], {"id": one["pattern"], "questions": [], "answers": []})
        row["questions"].append(one["question"])
        row["answers"] += texts[place * samples : (place + 1) * samples]
    for pattern, row in rows.items():
        right = right_answers([pattern] * len(row["answers"]), row["answers"])
        row["right"], row["different"] = len(right), len(set(right))
    return list(rows.values())


def shares(rows: Sequence[Mapping[str, Any]], key: str) -> Examples:
    """100 times `right` or `different` over the answers, a row an example."""
    columns = [[100.0 * row[key], len(row["answers"])] for row in rows]
    return Examples(ids=tuple(row["id"] for row in rows), columns=np.array(columns, float))
