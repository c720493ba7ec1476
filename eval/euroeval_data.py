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
import os
import shutil
import threading
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from configs.jsonl import read_jsonl

SPLITS = ("train", "val", "test")
ENTITY_LABELS = ("O", *(f"{part}-{kind}" for kind in ("LOC", "ORG", "PER", "MISC") for part in "BI"))
PROBE_S = 5.0
Row = dict[str, Any]
Source = Literal["hub", "local", "demo"]


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
    official: bool = True
    """Counts on EuroEval's leaderboard."""


TASKS: dict[str, TaskFormat] = {
    "foqa": TaskFormat(source="EuroEval/foqa", kind="question", few_shot=4),
    "fone": TaskFormat(source="EuroEval/fone-mini", kind="entities", few_shot=8, labels=ENTITY_LABELS),
    "scala-fo": TaskFormat(source="EuroEval/scala-fo", kind="label", few_shot=12, labels=("correct", "incorrect")),
    "fosent": TaskFormat(
        source="EuroEval/fosent", kind="label", few_shot=5, labels=("positive", "neutral", "negative")
    ),
    "wikiann-fo": TaskFormat(
        source="EuroEval/wikiann-fo-mini", kind="entities", few_shot=8, labels=ENTITY_LABELS, official=False
    ),
    "multi-wiki-qa-fo": TaskFormat(
        source="EuroEval/multi-wiki-qa-fo-mini", kind="question", few_shot=4, official=False
    ),
}
OFFICIAL = tuple(name for name, task in TASKS.items() if task.official)


# --- local splits --------------------------------------------------------------------------------------------------


def check_splits(folder: Path, tasks: Sequence[str]) -> None:
    """Read every local split of `tasks`; ValueError names file, row and mend."""
    for name in tasks:
        task = TASKS[name]
        if not (folder / name).is_dir():
            raise ValueError(
                f"{folder / name}: no such folder; {name} needs {', '.join(f'{split}.jsonl' for split in SPLITS)} there"
            )
        rows = {
            split: read_jsonl(folder / name / f"{split}.jsonl", problem=_CHECKS[task.kind](task)) for split in SPLITS
        }
        if task.kind == "question":
            for split, found in rows.items():
                _check_ids(folder / name / f"{split}.jsonl", found)
        _check_few_shot(folder / name / "train.jsonl", name, rows["train"])


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
        # work; each draw is looked at again before the harness gets it (eval/euroeval_run.py).
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


def _question_check(task: TaskFormat) -> Callable[[Row], str | None]:
    def problem(row: Row) -> str | None:
        if wrong := _text_problem(row, ("id", "context", "question")):
            return wrong
        answers = row.get("answers")
        texts = answers.get("text") if isinstance(answers, dict) else None
        starts = answers.get("answer_start") if isinstance(answers, dict) else None
        if not (isinstance(texts, list) and texts and all(isinstance(text, str) and text.strip() for text in texts)):
            return 'key \'answers\' must be {"text": [strings], "answer_start": [numbers]} with at least one text'
        if not (isinstance(starts, list) and len(starts) == len(texts)):
            return f"key 'answers': {len(texts)} texts need as many numbers in answer_start"
        return None

    return problem


def _entities_check(task: TaskFormat) -> Callable[[Row], str | None]:
    def problem(row: Row) -> str | None:
        for key in ("tokens", "labels"):
            if not (isinstance(row.get(key), list) and row[key] and all(isinstance(one, str) for one in row[key])):
                return f"key {key!r} must be a list of strings"
        if len(row["tokens"]) != len(row["labels"]):
            return f"{len(row['tokens'])} tokens and {len(row['labels'])} labels; give each token one label"
        unknown = sorted({label for label in row["labels"] if label.upper() not in task.labels})
        return f"unknown label {unknown[0]!r}; known are {', '.join(task.labels)}" if unknown else None

    return problem


def _label_check(task: TaskFormat) -> Callable[[Row], str | None]:
    def problem(row: Row) -> str | None:
        if wrong := _text_problem(row, ("text", "label")):
            return wrong
        if row["label"].lower() not in task.labels:
            return f"unknown label {row['label']!r}; known are {', '.join(task.labels)}"
        return None

    return problem


def _text_problem(row: Row, keys: Iterable[str]) -> str | None:
    for key in keys:
        if not (isinstance(row.get(key), str) and row[key].strip()):
            return f"key {key!r} must be a string that is not empty; columns here: {', '.join(sorted(row))}"
    return None


_CHECKS: Mapping[str, Callable[[TaskFormat], Callable[[Row], str | None]]] = {
    "question": _question_check,
    "entities": _entities_check,
    "label": _label_check,
}
_COLUMNS = {
    "question": ("id", "context", "question", "answers"),
    "entities": ("tokens", "labels"),
    "label": ("text", "label"),
}


def stage(folder: Path, target: Path, name: str) -> Path:
    """A copy of a task's local splits that `datasets` loads under EuroEval's split names; nothing is written to
    `folder`. The columns of every row are the same, so that the three files get one schema."""
    place = target / name
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    columns = _COLUMNS[TASKS[name].kind]
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
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return "HF_HUB_OFFLINE is set"
    url = f"{endpoint()}/api/datasets/{TASKS[tasks[0]].source}"
    said: list[str | None] = [f"{url}: no answer within {PROBE_S:.0f} s"]

    def ask() -> None:
        try:
            with urllib.request.urlopen(url, timeout=PROBE_S) as reply:
                said[0] = None if reply.status == 200 else f"{url}: HTTP {reply.status}"
        except (OSError, ValueError) as error:
            said[0] = f"{url}: {' '.join(str(error).split())}"

    # In a thread: looking a host name up has no time-out of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_S)
    return said[0]


def endpoint() -> str:
    """Address of the hub."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
