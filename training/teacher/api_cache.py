"""Replies of an endpoint on disk: one JSON object a line, appended whole, so that a kill loses none that had come.

Where the disk is full or may not be written to, they are in memory alone, which is said once: a cache ends no run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from configs.io.files import locked
from configs.io.lines import LineFile, whole_rows

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredReply:
    """What an endpoint said."""

    text: str
    """The reply."""
    tokens_in: int
    """Prompt tokens, as the endpoint counts them; 0 where it does not say."""
    tokens_out: int
    """Reply tokens."""


class ReplyCache:
    """Replies by key, in memory and in a file that several processes may append to."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._lines, self._lock, self._said = LineFile(self._path), threading.Lock(), False
        self._replies: dict[str, StoredReply] = {}
        with self._tolerated():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._replies = _read(self._path)

    def get(self, key: str) -> StoredReply | None:
        """The reply, or None."""
        with self._lock:
            return self._replies.get(key)

    def replies(self) -> list[StoredReply]:
        """All of them."""
        with self._lock:
            return list(self._replies.values())

    def put(self, key: str, reply: StoredReply) -> None:
        """Remember a reply; it is on disk when this returns, where it can be, and else goes there with the next one."""
        with self._lock, self._tolerated():
            self._replies[key] = reply
            with locked(self._path.with_suffix(".lock")):  # other ranks append too
                self._lines.append(json.dumps({"key": key, **asdict(reply)}, ensure_ascii=False))

    @contextlib.contextmanager
    def _tolerated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._said:
                log.warning("%s: %s; what is asked is kept in memory alone until it can be", self._path, error.strerror)
            self._said = True


def _read(path: Path) -> dict[str, StoredReply]:
    """Whole lines only: what a kill cut off is asked again."""
    found: dict[str, StoredReply] = {}
    for row in whole_rows(path):
        with contextlib.suppress(KeyError, TypeError, ValueError):
            found[row["key"]] = StoredReply(str(row["text"]), int(row["tokens_in"]), int(row["tokens_out"]))
    return found
