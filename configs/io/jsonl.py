"""Rows of a user's data, read strictly: a bad row is an error that names the file, the line and the mend.

What the rows are kept in is configs/io/tables.py, how a question may be laid out configs/io/questions.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from configs.io.questions import as_question
from configs.io.tables import READERS, data_set, layout, read_rows

Row = dict[str, Any]
TEXTS = ("text", "question", "context", "question_en", "context_en")
"""Keys whose values are strings."""


def read_jsonl(
    path: str | Path, required: Sequence[str] = (), convert: Callable[[Row], Row] | None = None
) -> list[Row]:
    """All rows of a file or data set (blank lines are skipped).

    Raises ValueError where there is no row, or where one is not UTF-8, not a JSON object, or lacks one of the
    `required` keys. Required values must be there and not be null, empty or only white space. `convert` makes another
    row of each first; its ValueError says what is wrong with a row, and the mend.
    """
    return list(iterate_jsonl(path, required, convert))


def iterate_jsonl(
    path: str | Path, required: Sequence[str] = (), convert: Callable[[Row], Row] | None = None
) -> Iterator[Row]:
    """The same rows and errors, one row in memory at a time."""
    empty = True
    for where, row in read_rows(path):
        try:
            made = row if convert is None else convert(row)
            _require_keys(made, required)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        empty = False
        yield made
    if empty:
        raise ValueError(f"{path}: the file has no row; write one JSON object a line, or a row below the header")


def read_texts(path: Path) -> list[str]:
    """The `text` of each row, or each line that is not blank of a file of another kind."""
    if layout(path) in READERS or data_set(path) is not None or not path.is_file():
        return [str(row["text"]).strip() for row in iterate_jsonl(path, ["text"])]
    texts = [row["text"] for _, row in READERS[".txt"](path)]
    if not texts:
        raise ValueError(f"{path}: the file has no text")
    return texts


def read_questions(path: str | Path, answers: bool = True) -> list[Row]:
    """Rows with `question`, perhaps `context`, `id`, `prompt`, and `answers` (a list of accepted ones; optional where
    `answers` is False), in any layout of configs/io/questions.py."""
    return read_jsonl(path, ["question", "answers"] if answers else ["question"], partial(as_question, answers=answers))


def read_open_questions(path: str | Path) -> list[Row]:
    """Questions with a `pattern`, a regular expression for the whole of a right answer."""
    return read_jsonl(path, ["question", "pattern"], _as_open_question)


def _as_open_question(row: Row) -> Row:
    """The row, where its pattern is one. Raises ValueError."""
    try:
        re.compile(row.get("pattern") or "")
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(f"key 'pattern' is no regular expression ({error})") from None
    return as_question(row, answers=False)


def _require_keys(row: Row, required: Sequence[str]) -> None:
    """Raise a ValueError unless all keys are there and hold something."""
    for key in required:
        value = row.get(key)
        if value is None or value == [] or (isinstance(value, str) and not value.strip()):
            state = "is empty" if key in row else "is missing"
            others = " (or prompt, messages, instruction: docs/data.md)" if "question" in required else ""
            raise ValueError(f"key {key!r} {state}; each row needs {', '.join(required)}{others}")
    for key in TEXTS:
        value = row.get(key)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"key {key!r} is a {type(value).__name__}; write a string")
