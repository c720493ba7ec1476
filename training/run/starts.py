"""The starts of a run: when each began, from which step, and why it ended."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from configs.io.lines import LineFile, whole_rows


class Starts:
    """The starts of a run, in starts.jsonl. Written by one rank; a start without an end was killed."""

    def __init__(self, folder: Path, environment: Mapping[str, str] = os.environ) -> None:
        self._path = folder / "starts.jsonl"
        self._lines = LineFile(self._path)
        self._environment = environment
        self._open = False

    def begin(self, from_step: int, ranks: int) -> None:
        """A start begins: steps that were done before, and its number of ranks."""
        restarts = self._environment.get("SLURM_RESTART_COUNT", "0")
        self._append(
            "start",
            from_step=from_step,
            ranks=ranks,
            slurm_job=self._environment.get("SLURM_JOB_ID"),
            slurm_restart_count=int(restarts) if restarts.isdigit() else 0,
            host=socket.gethostname(),
        )
        self._open = True

    def end(self, reason: str, exit_code: int, step: int | None = None) -> None:
        """It ends: why, with which exit code, and how many steps are then done (None: not known). The first counts."""
        if self._open:
            self._open = False
            self._append("end", reason=reason, exit_code=exit_code, step=step)

    def listed(self) -> list[dict[str, Any]]:
        """One object a start: from_step, start, end, reason, exit_code, ...; reason `killed` where nothing was said."""
        found: list[dict[str, Any]] = []
        for row in whole_rows(self._path):
            time = row.pop("time")
            if row.pop("event") == "start":
                found.append({"start": time, **row, "end": None, "reason": None, "exit_code": None, "step": None})
            elif found:
                found[-1] |= {"end": time, **row}
        for start in found[:-1]:
            start["reason"] = start["reason"] or "killed"
        return found

    def _append(self, event: str, **values: Any) -> None:
        time = datetime.now(UTC).isoformat(timespec="seconds")
        with contextlib.suppress(OSError):  # a full disk; the log says the same
            self._lines.append(json.dumps({"event": event, "time": time, **values}))
