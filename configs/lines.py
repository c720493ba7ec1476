"""A file of lines that grows, on a disk that may be full for a while."""

from __future__ import annotations

import os
from pathlib import Path


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
        handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            end = os.fstat(handle).st_size
            data = b"".join(self._waiting)
            try:
                while data:
                    data = data[os.write(handle, data) :]  # a full disk takes what fits, then refuses
            except OSError:
                os.ftruncate(handle, end)
                raise
        finally:
            os.close(handle)
        self._waiting.clear()
