"""Where a step's time goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds by phase within one step."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._phases: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        name = f"seconds/{phase}"  # a phase may come several times in a step
        self._phases[name] = self._phases.get(name, 0.0) + time.perf_counter() - start

    def finish(self) -> dict[str, float]:
        """All phases and the total."""
        return {**self._phases, "seconds/total": time.perf_counter() - self._start}
