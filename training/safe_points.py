"""Where a step can be left: between phases and between passes, as long as it has changed nothing.

A step of a large model takes minutes, a scheduler's warning often no more. A step that is left before its first
optimizer step is as if it had never begun: what it samples is a function of (seed, step, prompt), so that the resumed
run takes it again exactly.
"""

from __future__ import annotations

from typing import Protocol

from training import distributed
from training.stopping import StopRequest, TimeLimit


def nothing() -> None:
    """Where nobody has to be asked."""


class StepAbandoned(Exception):
    """All ranks have left the step that they were in, which has changed nothing."""


class Watched(Protocol):
    """Who is told how far this rank has come (training/watchdog.py)."""

    def enter(self, phase: str, step: int) -> None:
        """This rank begins a phase."""
        ...


class SafePoints:
    """Asked by all ranks at the same places of a step."""

    def __init__(self, stop: StopRequest, limit: TimeLimit, watched: Watched, step: int) -> None:
        """`step` steps are done."""
        self.limit = limit
        self._stop, self._watched = stop, watched
        self._step, self._open = step, False
        self.advanced = False
        """Whether this start has finished a step."""
        self.reason = ""
        """Why the ranks are leaving; empty while they are not."""

    def begin(self, step: int) -> None:
        """A step begins (from 0)."""
        self._step, self._open = step, True

    def close(self) -> None:
        """The step is about to change the models: it has to be finished now."""
        self._open = False

    def enter(self, phase: str) -> None:
        """A phase begins that is not left."""
        self._watched.enter(phase, self._step)

    def phase(self, name: str) -> None:
        """A phase begins. Collective. Raises StepAbandoned."""
        self.enter(name)
        self.check()

    def check(self) -> None:
        """Raises StepAbandoned on every rank where one of them was asked to stop. Collective."""
        if self._open and self._leaving(next_step=False):
            raise StepAbandoned(self.reason)

    def after_step(self, seconds: float) -> bool:
        """Whether to stop before the next step; this one took `seconds`. Collective."""
        self.advanced = True
        self.limit.took_step(seconds)
        return self._leaving(next_step=True)

    def _leaving(self, *, next_step: bool) -> bool:
        over = self.limit.is_over(next_step=next_step)
        if not distributed.any_rank(self._stop.requested or over):
            return False
        self.reason = self._stop.reason or ("time limit" if over else "another rank was asked to stop")
        return True
