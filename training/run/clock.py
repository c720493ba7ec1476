"""Where a step's time goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Clock:
    """Seconds by phase within one step."""

    def __init__(self, at_phase: Callable[[str], None] = lambda _: None) -> None:
        """`at_phase` is called with the name of each phase before it begins."""
        self._at_phase = at_phase
        self._start = time.perf_counter()
        self._phases: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._at_phase(phase)
        start = time.perf_counter()
        yield
        name = f"seconds/{phase}"  # a phase may come several times in a step
        self._phases[name] = self._phases.get(name, 0.0) + time.perf_counter() - start

    def finish(self) -> dict[str, float]:
        """All phases and the total."""
        return {**self._phases, "seconds/total": time.perf_counter() - self._start}
