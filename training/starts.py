"""The starts of a run: when each began and from which step, and why it ended (runs/NAME/starts.jsonl)."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FILE = "starts.jsonl"


class Starts:
    """Written by one rank; a start without an end was killed."""

    def __init__(self, folder: Path, environment: Mapping[str, str] = os.environ) -> None:
        self._path = folder / FILE
        self._environment = environment
        self._open = False

    def begin(self, from_step: int, ranks: int) -> None:
        """A start begins: steps that were done before, and its number of ranks."""
        restarts = self._environment.get("SLURM_RESTART_COUNT", "0")
        self._append(
            {
                "event": "start",
                "time": _now(),
                "from_step": from_step,
                "ranks": ranks,
                "slurm_job": self._environment.get("SLURM_JOB_ID"),
                "slurm_restart_count": int(restarts) if restarts.isdigit() else 0,
                "host": socket.gethostname(),
            }
        )
        self._open = True

    def end(self, reason: str, exit_code: int, step: int | None = None) -> None:
        """It ends: why, with which exit code, and how many steps are then done (None: not known). The first counts."""
        if self._open:
            self._open = False
            row = {"event": "end", "time": _now(), "reason": reason, "exit_code": exit_code, "step": step}
            self._append(row)

    def listed(self) -> list[dict[str, Any]]:
        """One object a start: from_step, start, end, reason, exit_code, ...; reason `killed` where nothing was said."""
        if not self._path.is_file():
            return []
        found: list[dict[str, Any]] = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # a line that was not finished
            time = row.pop("time")
            if row.pop("event") == "start":
                found.append({"start": time, **row, "end": None, "reason": None, "exit_code": None, "step": None})
            elif found:
                found[-1] |= {"end": time, **row}
        for start in found[:-1]:
            start["reason"] = start["reason"] or "killed"
        return found

    def _append(self, row: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # a full disk; the log says the same
            self._write(row)

    def _write(self, row: Mapping[str, Any]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab+") as out:
            if out.tell() and self._path.read_bytes()[-1:] != b"\n":
                out.write(b"\n")  # behind a line that was not finished
            out.write(json.dumps(row).encode() + b"\n")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
