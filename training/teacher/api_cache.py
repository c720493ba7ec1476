"""Replies of an endpoint on disk: one JSON object a line, appended whole, so that a kill loses none that had come."""

from __future__ import annotations

import contextlib
import json
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from configs.io.files import locked
from configs.io.lines import LineFile, whole_rows


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
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
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
        """Remember a reply; it is on disk when this returns."""
        with self._lock, locked(self._path.with_suffix(".lock")):  # other ranks append too
            LineFile(self._path).append(json.dumps({"key": key, **asdict(reply)}, ensure_ascii=False))
            self._replies[key] = reply


def _read(path: Path) -> dict[str, StoredReply]:
    """Whole lines only: what a kill cut off is asked again."""
    found: dict[str, StoredReply] = {}
    for row in whole_rows(path):
        with contextlib.suppress(KeyError, TypeError, ValueError):
            found[row["key"]] = StoredReply(str(row["text"]), int(row["tokens_in"]), int(row["tokens_out"]))
    return found
