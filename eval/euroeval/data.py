"""EuroEval's Faroese data sets: their format, checked before anything heavy is imported, and where they come from.

Local splits are EuroEval's own format: DIR/TASK/train.jsonl, val.jsonl and test.jsonl, TASK one of TASKS.

    foqa, multi-wiki-qa-fo   id (unique), context, question, answers {"text": [...], "answer_start": [...]}
    fone, wikiann-fo         tokens [...], labels [...] (O, B-/I- of LOC ORG PER MISC)
    scala-fo                 text, label (correct, incorrect)
    fosent                   text, label (negative, neutral, positive)
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from configs.io.jsonl import read_jsonl

SPLITS = ("train", "val", "test")
ENTITY_LABELS = ("O", *(f"{part}-{kind}" for kind in ("LOC", "ORG", "PER", "MISC") for part in "BI"))
PROBE_S = 5.0
Row = dict[str, Any]
Task = Literal["foqa", "fone", "scala-fo", "fosent", "wikiann-fo", "multi-wiki-qa-fo"]
OFFICIAL: tuple[Task, ...] = ("foqa", "fone", "scala-fo", "fosent")
"""What counts on EuroEval's leaderboard."""
DEMO_SPLITS = "euroeval"
"""Folder of the demo's splits, beside its held-out questions (training/data/demo/splits.py)."""


@dataclass(frozen=True, kw_only=True)
class TaskFormat:
    """What the rows of a task must be; held against the installed EuroEval by a test."""

    source: str
    """Id on the hub."""
    kind: Literal["question", "entities", "label"]
    few_shot: int
    """Examples before each row."""
    labels: tuple[str, ...] = ()
    """Known labels; none for questions."""


TASKS: dict[str, TaskFormat] = {
    "foqa": TaskFormat(source="EuroEval/foqa", kind="question", few_shot=4),
    "fone": TaskFormat(source="EuroEval/fone-mini", kind="entities", few_shot=8, labels=ENTITY_LABELS),
    "scala-fo": TaskFormat(source="EuroEval/scala-fo", kind="label", few_shot=12, labels=("correct", "incorrect")),
    "fosent": TaskFormat(
        source="EuroEval/fosent", kind="label", few_shot=5, labels=("positive", "neutral", "negative")
    ),
    "wikiann-fo": TaskFormat(source="EuroEval/wikiann-fo-mini", kind="entities", few_shot=8, labels=ENTITY_LABELS),
    "multi-wiki-qa-fo": TaskFormat(source="EuroEval/multi-wiki-qa-fo-mini", kind="question", few_shot=4),
}
COLUMNS = {
    "question": ("id", "context", "question", "answers"),
    "entities": ("tokens", "labels"),
    "label": ("text", "label"),
}


# --- local splits --------------------------------------------------------------------------------------------------


def is_demo(folder: Path) -> bool:
    """Whether these splits are the demo's, which is built into a folder of this name (training/data/demo/models.py)."""
    return folder.name == DEMO_SPLITS and folder.parent.name.startswith("demo-")


def check_splits(folder: Path, tasks: Sequence[str]) -> None:
    """Read every local split of `tasks`; ValueError names file, row and mend."""
    for name in tasks:
        task = TASKS[name]
        if not (folder / name).is_dir():
            raise ValueError(
                f"{folder / name}: no such folder; {name} needs {', '.join(f'{split}.jsonl' for split in SPLITS)} there"
            )
        for split in SPLITS:
            file = folder / name / f"{split}.jsonl"
            rows = read_jsonl(file, convert=partial(_checked, task))
            if task.kind == "question":
                _check_ids(file, rows)
            if split == "train":
                _check_few_shot(file, name, rows)


def _check_ids(file: Path, rows: Sequence[Row]) -> None:
    """SQuAD's metric keys by id: of two rows with one id it would count one."""
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        first = seen.setdefault(row["id"], number)
        if first != number:
            raise ValueError(f"{file}: rows {first} and {number} have the same id {row['id']!r}; give each its own")


def _check_few_shot(file: Path, name: str, rows: Sequence[Row]) -> None:
    """Whether EuroEval finds its examples: it takes different ones, and those with entities it would seek for ever."""
    task = TASKS[name]
    if task.kind == "entities":
        # EuroEval draws the rows with replacement before it takes examples from them, so this is the least that can
        # work; each draw is looked at again before the harness gets it (check_draws).
        found, what = sentences_with_entities(rows), "different sentences with entities"
    elif task.kind == "label":
        missing = [label for label in task.labels if all(row["label"].lower() != label for row in rows)]
        if len(missing) == len(task.labels):
            raise ValueError(f"{file}: no row with one of the labels {', '.join(task.labels)}")
        found, what = len({row["text"] for row in rows}), "different texts"
    else:
        found, what = len({row["context"] for row in rows}), "different contexts"
    if found < task.few_shot:
        raise ValueError(f"{file}: {found} {what}; {name} shows {task.few_shot} examples, so write at least that many")


def sentences_with_entities(rows: Iterable[Row]) -> int:
    """Different sentences in which an entity begins: what EuroEval takes its examples from."""
    return len({tuple(row["tokens"]) for row in rows if any(label.upper().startswith("B-") for label in row["labels"])})


def check_draws(config: Any, samples: Sequence[Any]) -> None:
    """EuroEval looks for examples with entities for ever where a sample holds too few. `config`: its DatasetConfig."""
    for number, sample in enumerate(samples if TASKS[config.name].kind == "entities" else ()):
        if (found := sentences_with_entities(sample["train"])) < config.num_few_shot_examples:
            raise ValueError(
                f"{config.name}: iteration {number} draws {found} different training sentences with entities, and "
                f"{config.num_few_shot_examples} examples are shown; put more of them into train.jsonl"
            )


def _checked(task: TaskFormat, row: Row) -> Row:
    """The row. Raises ValueError with the mend where it is none of the task."""
    if (found := _row_problem(task, row)) is not None:
        raise ValueError(found)
    return row


def _row_problem(task: TaskFormat, row: Row) -> str | None:
    texts = [key for key in COLUMNS[task.kind] if key not in ("answers", "tokens", "labels")]
    for key in texts:
        if not (isinstance(row.get(key), str) and row[key].strip()):
            return f"key {key!r} must be a string that is not empty; columns here: {', '.join(sorted(row))}"
    if task.kind == "question":
        return _answers_problem(row.get("answers"))
    for key in ("tokens", "labels") if task.kind == "entities" else ():
        if not (isinstance(row.get(key), list) and row[key] and all(isinstance(one, str) for one in row[key])):
            return f"key {key!r} must be a list of strings"
    if task.kind == "entities" and len(row["tokens"]) != len(row["labels"]):
        return f"{len(row['tokens'])} tokens and {len(row['labels'])} labels; give each token one label"
    known = {one.lower() for one in task.labels}
    unknown = [label for label in row.get("labels") or [row.get("label")] if label.lower() not in known]
    return f"unknown label {min(unknown)!r}; known are {', '.join(task.labels)}" if unknown else None


def _answers_problem(answers: Any) -> str | None:
    texts, starts = ((answers if isinstance(answers, dict) else {}).get(key) for key in ("text", "answer_start"))
    if not (isinstance(texts, list) and texts and all(isinstance(text, str) and text.strip() for text in texts)):
        return 'key \'answers\' must be {"text": [strings], "answer_start": [numbers]} with at least one text'
    if not (isinstance(starts, list) and len(starts) == len(texts)):
        return f"key 'answers': {len(texts)} texts need as many numbers in answer_start"
    return None


def stage(folder: Path, target: Path, name: str) -> Path:
    """A copy of a task's local splits that `datasets` loads under EuroEval's split names; nothing is written to
    `folder`. The columns of every row are the same, so that the three files get one schema."""
    place = target / name
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    columns = COLUMNS[TASKS[name].kind]
    for split in SPLITS:
        rows = read_jsonl(folder / name / f"{split}.jsonl")
        lines = (json.dumps({key: row[key] for key in columns}, ensure_ascii=False) for row in rows)
        (place / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    files = "".join(f"  - split: {split}\n    path: {split}.jsonl\n" for split in SPLITS)
    (place / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n")
    return place


def fingerprint(rows: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 of the rows as JSON with sorted keys, one a line: the same for the same rows, wherever they lay."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, ensure_ascii=False, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


# --- the hub -------------------------------------------------------------------------------------------------------


def probe_hub(tasks: Sequence[str]) -> str | None:
    """None where the hub answers for the first task's data set within PROBE_S; else what it said instead."""
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(TASKS[tasks[0]].source, timeout=PROBE_S)
    except Exception as error:  # the hub's client raises many kinds
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None
