"""JSONL files, read strictly: a bad row is an error that names the file, the line and the mend."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_jsonl(path: str | Path, required: Sequence[str] = ()) -> list[dict[str, Any]]:
    """All rows of a JSONL file; blank lines are skipped.

    Raises ValueError where the file is missing or has no row, or where a line is not UTF-8, not a JSON object, or
    lacks one of the `required` keys. Required values must be there and not be null, empty or only white space.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the path of a JSONL file (one JSON object a line)")
    rows = []
    # Binary lines: a file that is not UTF-8 still gets a line number, and U+2028 inside a string ends no line.
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            if raw.strip():
                rows.append(_parse_row(raw, required, f"{path}:{number}"))
    if not rows:
        raise ValueError(f"{path}: the file has no row; write one JSON object a line")
    return rows


def _parse_row(raw: bytes, required: Sequence[str], where: str) -> dict[str, Any]:
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
    for key in required:
        value = row.get(key)
        if value is None or value == [] or (isinstance(value, str) and not value.strip()):
            state = "is empty" if key in row else "is missing"
            raise ValueError(f"{where}: key {key!r} {state}; each row needs {', '.join(required)}")
    return row
