"""Leaving in good order: signals and the clock ask the loop to stop; it leaves where every rank can."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
from types import FrameType

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


def _leave_terminal() -> None:
    """Output that went to a terminal which is gone goes nowhere; it would be an error in whoever prints."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
