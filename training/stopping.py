"""Leaving in good order: signals ask the loop to stop after the step it is in."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType

REQUEUE = 75
"""Exit code that tells a scheduler to start the run again (EX_TEMPFAIL)."""
INTERRUPTED = 130
"""Exit code after Ctrl-C."""


class StopRequest:
    """Set by SIGTERM, SIGUSR1 or Ctrl-C. Before `defer`, a signal ends the program at once (through `finally`)."""

    def __init__(self) -> None:
        self.requested = False
        self.exit_code = REQUEUE
        self._deferred = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def defer(self) -> None:
        """From now on a signal only sets `requested`; the loop looks at it after each step."""
        self._deferred = True

    def undefer(self) -> None:
        """Signals end the program at once again."""
        self._deferred = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        code = INTERRUPTED if number == signal.SIGINT else REQUEUE
        again = self.requested and number == signal.SIGINT
        if not self.requested:
            self.requested, self.exit_code = True, code
        if not self._deferred or again:
            raise SystemExit(self.exit_code)


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
