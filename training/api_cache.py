"""Replies of an endpoint on disk: one JSON object a line, appended whole, so that a kill loses none that had come."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path


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
        line = json.dumps({"key": key, **asdict(reply)}, ensure_ascii=False).encode() + b"\n"
        with self._lock:
            with self._path.open("ab+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # other ranks append too; released on close
                file.seek(0, os.SEEK_END)
                if file.tell() > 0:
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":  # a line that a kill cut off
                        line = b"\n" + line
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            self._replies[key] = reply


def _read(path: Path) -> dict[str, StoredReply]:
    """Whole lines only: what a kill cut off is asked again."""
    found: dict[str, StoredReply] = {}
    if not path.exists():
        return found
    for raw in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(raw)
            found[row["key"]] = StoredReply(str(row["text"]), int(row["tokens_in"]), int(row["tokens_out"]))
        except (ValueError, KeyError, TypeError):
            continue
    return found
