"""JSONL files (and the tables of configs/tables.py), read strictly: a bad row is an error that names the file, the line
and the mend."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from configs.tables import is_table, read_table

Row = dict[str, Any]


def read_jsonl(
    path: str | Path, required: Sequence[str] = (), problem: Callable[[Row], str | None] | None = None
) -> list[Row]:
    """All rows of a JSONL file (blank lines are skipped), or of a table.

    Raises ValueError where the file is missing or has no row, or where a line is not UTF-8, not a JSON object, or
    lacks one of the `required` keys. Required values must be there and not be null, empty or only white space.
    `problem` may look further: it returns what is wrong with a row, and the mend, or None.
    """
    return list(iterate_jsonl(path, required, problem))


def iterate_jsonl(
    path: str | Path, required: Sequence[str] = (), problem: Callable[[Row], str | None] | None = None
) -> Iterator[Row]:
    """The same rows and errors, one row in memory at a time."""
    table = is_table(path)
    empty = True
    for where, row in read_table(path) if table else _read_lines(Path(path), required):
        if table:
            _require_keys(row, required, where)
        if problem is not None and (found := problem(row)) is not None:
            raise ValueError(f"{where}: {found}")
        empty = False
        yield row
    if empty:
        state = "the table has no row" if table else "the file has no row; write one JSON object a line"
        raise ValueError(f"{path}: {state}")


def _read_lines(path: Path, required: Sequence[str]) -> Iterator[tuple[str, Row]]:
    """(file:line, row) of a JSONL file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the path of a JSONL file (one JSON object a line)")
    # Binary lines: a file that is not UTF-8 still gets a line number, and U+2028 inside a string ends no line.
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            if raw.strip():
                yield f"{path}:{number}", _parse_row(raw, required, f"{path}:{number}")


def read_questions(path: str | Path, answers: bool = True) -> list[Row]:
    """Rows with `question`, perhaps `context` and `id`, and `answers` (a list of accepted answers; optional where
    `answers` is False)."""
    return read_jsonl(path, ["question", "answers"] if answers else ["question"], _question_problem)


def _question_problem(row: Row) -> str | None:
    """What keeps a row from being a question, and the mend; None if nothing."""
    for key in ("question", "context", "question_en", "context_en"):
        if not isinstance(row.get(key, ""), str) and not (key != "question" and row[key] is None):
            return f"key {key!r} is a {type(row[key]).__name__}; write a string"
    accepted = row.get("answers")
    if accepted is None:
        return None
    if not isinstance(accepted, list) or not all(isinstance(answer, str) and answer.strip() for answer in accepted):
        return f"key 'answers' is {json.dumps(accepted, ensure_ascii=False)[:80]}; write a list of strings"
    return None


def _parse_row(raw: bytes, required: Sequence[str], where: str) -> Row:
    """One line as a dict with all `required` keys, or a ValueError that starts with `where`."""
    try:
        row = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        mend = "write one whole JSON object on each line"
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno}); {mend}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a {type(row).__name__}, not an object; write a JSON object with keys, {{...}}")
    _require_keys(row, required, where)
    return row


def _require_keys(row: Row, required: Sequence[str], where: str) -> None:
    """Raise a ValueError that starts with `where` unless all keys are there and hold something."""
    for key in required:
        value = row.get(key)
        if value is None or value == [] or (isinstance(value, str) and not value.strip()):
            state = "is empty" if key in row else "is missing"
            raise ValueError(f"{where}: key {key!r} {state}; each row needs {', '.join(required)}")
