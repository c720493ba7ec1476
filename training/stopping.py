"""Leaving in good order: signals and the clock ask the loop to stop; it leaves where every rank can."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

REQUEUE = 75
"""Exit code that tells a scheduler to start the run again (EX_TEMPFAIL)."""
INTERRUPTED = 130
"""Exit code after Ctrl-C."""
LONGER = 1.25
"""A step or a checkpoint may take this many times what the longest so far took."""


class StopRequest:
    """Set by SIGTERM, SIGUSR1 or Ctrl-C. Before `defer`, a signal ends the program at once (through `finally`)."""

    def __init__(self) -> None:
        self.requested = False
        self.exit_code = REQUEUE
        self.reason = ""
        """Name of the signal."""
        self._deferred = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def defer(self) -> None:
        """From now on a signal only sets `requested`; the loop looks at it at its safe points."""
        self._deferred = True

    def undefer(self) -> None:
        """Signals end the program at once again."""
        self._deferred = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        code = INTERRUPTED if number == signal.SIGINT else REQUEUE
        again = self.requested and number == signal.SIGINT
        if not self.requested:
            self.requested, self.exit_code, self.reason = True, code, signal.Signals(number).name
        if not self._deferred or again:
            raise SystemExit(self.exit_code)


class TimeLimit:
    """The end of this start's time, and whether there is still enough of it.

    Kept free: a twentieth of the whole time, at most a minute, for leaving and for a first checkpoint whose time is not
    known yet; on top of it what the last checkpoint took.
    """

    def __init__(self, limit_s: float | None, environment: Mapping[str, str] = os.environ) -> None:
        """`limit_s`: seconds from now. The end of the SLURM job counts as well, where SLURM says it; the earlier one
        is taken."""
        now = time.time()
        ends = [now + limit_s] if limit_s is not None else []
        if environment.get("SLURM_JOB_END_TIME", "").isdigit():
            ends.append(float(environment["SLURM_JOB_END_TIME"]))
        self._end = min(ends, default=None)
        self._margin_s = 0.0 if self._end is None else min(60.0, max(self._end - now, 0.0) / 20)
        self._step_s = self._checkpoint_s = 0.0

    def took_step(self, seconds: float) -> None:
        """A whole step took so long."""
        self._step_s = max(self._step_s, seconds)

    def took_checkpoint(self, seconds: float) -> None:
        """The last checkpoint took so long."""
        self._checkpoint_s = seconds

    def is_over(self, *, next_step: bool) -> bool:
        """Whether it is time for the last checkpoint; with `next_step`, whether one more step would be too much."""
        if self._end is None:
            return False
        needed_s = self._margin_s + LONGER * (self._checkpoint_s + (self._step_s if next_step else 0.0))
        return time.time() + needed_s > self._end


def watch_launcher(interval_s: float = 1.0) -> None:
    """End this process, as by SIGTERM, when the launcher that started it is gone.

    `deepspeed` is two processes above a rank. Killing the first leaves the second and its ranks behind, so both are
    watched. Does nothing without a launcher, or where there is no /proc.
    """
    launcher = os.getppid()
    with contextlib.suppress(OSError):
        if b"deepspeed" in Path(f"/proc/{launcher}/cmdline").read_bytes():
            started = (launcher, _parent_of(launcher))
            thread = threading.Thread(target=_watch, args=(started, interval_s), name="launcher-watch", daemon=True)
            thread.start()


def _watch(started: tuple[int, int | None], interval_s: float) -> None:
    while (os.getppid(), _parent_of(started[0])) == started:
        time.sleep(interval_s)
    os.kill(os.getpid(), signal.SIGTERM)


def _parent_of(process: int) -> int | None:
    """Parent of a process, None where it is gone."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    return int(status.rpartition(")")[2].split()[1])
