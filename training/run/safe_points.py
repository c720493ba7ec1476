"""The phases of a step: how long each takes, and where the step can be left: between phases and between passes, as long
as it has changed nothing.

A step of a large model takes minutes, a scheduler's warning often no more. A step that is left before its first
optimizer step is as if it had never begun: what it samples is a function of (seed, step, prompt), so that the resumed
run takes it again exactly.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from training import distributed
from training.run.stopping import StopRequest

LONGER = 1.25
"""A step or a checkpoint may take this many times what the longest so far took."""


def nothing() -> None:
    """Where nobody has to be asked."""


class StepAbandoned(Exception):
    """All ranks have left the step that they were in, which has changed nothing."""


class TimeLimit:
    """The end of this start's time, and whether there is still enough of it.

    Kept free: a twentieth of the whole time, at most a minute, for leaving and for a first checkpoint whose time is not
    known yet; on top of it what the last checkpoint took.
    """

    def __init__(self, limit_s: float | None, environment: Mapping[str, str] = os.environ) -> None:
        """`limit_s`: seconds from now. The end of the SLURM job counts as well, where SLURM says it; the earlier one
        is taken. An end that is over is that of an earlier job, in whose shell this runs."""
        self._ends: list[tuple[Callable[[], float], float]] = []
        if limit_s is not None:
            self._ends.append((time.monotonic, time.monotonic() + limit_s))  # whatever is done to the clock
        end = environment.get("SLURM_JOB_END_TIME", "")
        if end.isdigit() and float(end) > time.time():
            self._ends.append((time.time, float(end)))
        self._margin_s = min(60.0, max(self._left_s(), 0.0) / 20)
        self.step_s = self.checkpoint_s = 0.0
        """What the longest step and the last checkpoint took."""

    def is_over(self, *, next_step: bool) -> bool:
        """Whether it is time for the last checkpoint; with `next_step`, whether one more step would be too much."""
        needed_s = self._margin_s + LONGER * (self.checkpoint_s + (self.step_s if next_step else 0.0))
        return needed_s > self._left_s()

    def _left_s(self) -> float:
        return min((end - clock() for clock, end in self._ends), default=math.inf)


@dataclass(frozen=True)
class Place:
    """How far a rank is."""

    step: int = 0
    """Steps that are done."""
    phase: str = "start"
    """Name of the phase that it is in."""
    begun: int = 0
    """Phases begun since the start; every rank begins the same ones."""


class SafePoints:
    """Asked by all ranks at the same places of a step."""

    def __init__(self, stop: StopRequest, limit: TimeLimit) -> None:
        self.limit = limit
        self.place = Place()
        self._stop, self._open = stop, False
        self._began_s, self._seconds = time.monotonic(), dict[str, float]()
        self.advanced = False
        """Whether this start has finished a step."""
        self.reason = ""
        """Why the ranks are leaving; empty while they are not."""

    def begin(self, step: int) -> None:
        """A step begins (from 0)."""
        self.place, self._open = replace(self.place, step=step), True
        self._began_s, self._seconds = time.monotonic(), {}

    def close(self) -> None:
        """The step is about to change the models: it has to be finished now."""
        self._open = False

    def enter(self, phase: str) -> None:
        """A phase begins that is not left."""
        self.place = replace(self.place, phase=phase, begun=self.place.begun + 1)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase of the step, whose seconds count; it may come several times. Collective. Raises StepAbandoned before
        it begins."""
        self.enter(name)
        self.check()
        began_s = time.monotonic()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - began_s

    def seconds(self) -> dict[str, float]:
        """What each phase of the step has taken, and all of it."""
        took = self._seconds | {"total": time.monotonic() - self._began_s}
        return {f"seconds/{phase}": seconds for phase, seconds in took.items()}

    def check(self) -> None:
        """Raises StepAbandoned on every rank where one of them was asked to stop. Collective."""
        if self._open and self._leaving(next_step=False):
            raise StepAbandoned(self.reason)

    def after_step(self) -> bool:
        """Whether to stop before the next step. This one took as long as its validation, too, which is not left.
        Collective."""
        self.advanced = True
        self.limit.step_s = max(self.limit.step_s, time.monotonic() - self._began_s)
        return self._leaving(next_step=True)

    def _leaving(self, *, next_step: bool) -> bool:
        over = self.limit.is_over(next_step=next_step)
        if not distributed.any_rank(self._stop.requested or over):
            return False
        self.reason = self._stop.reason or ("time limit" if over else "another rank was asked to stop")
        return True
