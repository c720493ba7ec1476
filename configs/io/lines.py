"""A file of lines that grows, on a disk that may be full for a while."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.io.files import parse_json


class LineFile:
    """Lines go to the end of the file whole or not at all; those that could not be written go first the next time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: list[bytes] = []

    def append(self, line: str) -> None:
        """One more line. Raises OSError where it could not be written; it is kept."""
        self._waiting.append(line.encode() + b"\n")
        self.flush()

    def flush(self) -> None:
        """Write what waits. Raises OSError where that cannot be done."""
        if not self._waiting:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            end = os.fstat(handle).st_size
            data = b"".join(self._waiting)
            if end and os.pread(handle, 1, end - 1) != b"\n":
                data = b"\n" + data  # behind a line that a killed process did not finish
            try:
                while data:
                    data = data[os.write(handle, data) :]  # a full disk takes what fits, then refuses
            except OSError:
                os.ftruncate(handle, end)
                raise
        finally:
            os.close(handle)
        self._waiting.clear()


def whole_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of lines, without one that a killed process did not finish."""
    if path.is_file():
        text = path.read_text(encoding="utf-8", errors="replace")
        for line in text.split("\n"):  # splitlines() would cut at U+2028 too
            with contextlib.suppress(ValueError):
                if isinstance(row := parse_json(line), dict):
                    yield row
