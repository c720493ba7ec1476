"""Leaving in good order: signals and the clock ask the loop to stop; it leaves where every rank can."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

REQUEUE = 75
"""Exit code that tells a scheduler to start the run again (EX_TEMPFAIL)."""
INTERRUPTED = 130
"""Exit code after Ctrl-C."""


class RunFailed(Exception):
    """The run ends with this message: it says what is wrong, and a new start would not mend it."""


class StopRequest:
    """Set by SIGTERM, SIGUSR1, SIGHUP (the terminal is gone) or Ctrl-C; a HUP that `nohup` has switched off stays so.
    Before `defer`, a signal ends the program at once (through `finally`)."""

    def __init__(self, *, listen: bool = True) -> None:
        """`listen` false: no signal sets it (a notebook's kernel has its own handlers)."""
        self.requested = False
        self.exit_code = REQUEUE
        self.reason = ""
        """Name of the signal."""
        self._deferred = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP) if listen else ():
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def defer(self) -> None:
        """From now on a signal only sets `requested`; the loop looks at it at its safe points."""
        self._deferred = True

    def undefer(self) -> None:
        """Signals end the program at once again, one that has come meanwhile too (SystemExit)."""
        self._deferred = False
        if self.requested:
            raise SystemExit(self.exit_code)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _leave_terminal()
        code = INTERRUPTED if number == signal.SIGINT else REQUEUE
        again = self.requested and number == signal.SIGINT
        if not self.requested:
            self.requested, self.exit_code, self.reason = True, code, signal.Signals(number).name
        if not self._deferred or again:
            raise SystemExit(self.exit_code)


class Unfailing:
    """A stream whose errors are nobody's: a log on a full disk, or a pipe that nobody reads any more, ends no run."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As the stream; what cannot be written is lost."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As the stream."""
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _leave_terminal() -> None:
    """Output that went to a terminal which is gone goes nowhere; it would be an error in whoever prints."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)


def watch_launcher(interval_s: float = 1.0) -> None:
    """End this process, as by SIGTERM, when the launcher that started it is gone.

    `deepspeed` is two processes above a rank. Killing the first leaves the second and its ranks behind, so both are
    watched. Does nothing without that launcher, or where there is no /proc: the parent of another start may leave.
    """
    launcher = os.getppid()
    with contextlib.suppress(OSError):
        if b"deepspeed.launcher" in Path(f"/proc/{launcher}/cmdline").read_bytes():
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
