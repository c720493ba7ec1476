"""A file of lines that grows, on a disk that may be full for a while."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
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
        yield from (row for row, _ in _rows(path))


def cut_behind(path: Path, kept: Callable[[dict[str, Any]], bool]) -> None:
    """End the file behind its last row that is `kept`. What stays is not written again, however long it is."""
    os.truncate(path, max((end for row, end in _rows(path) if kept(row)), default=0))


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Each whole row, and where its line ends, in bytes; one in memory at a time."""
    end = 0
    with path.open("rb") as lines:  # as text, U+2028 and others would end a line too
        for line in lines:
            end += len(line)
            with contextlib.suppress(ValueError):
                if isinstance(row := parse_json(line.decode(errors="replace")), dict):
                    yield row, end
