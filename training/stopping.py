"""Leaving in good order: signals ask the loop to stop after the step it is in."""

from __future__ import annotations

import signal
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
