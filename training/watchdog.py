"""Who has not arrived? A thread of each rank that ends it when no rank gets on any more.

A rank that is stopped, or whose node is lost, leaves the others in a collective. torch's own time-outs do not say in
which phase or for whom they waited, gloo's ends only the call, and NCCL's does not end the process that is stuck. So
each rank tells the trainer's store how far it is, and one that has waited too long looks there.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, TCPStore

from training import distributed


@dataclass(frozen=True)
class Place:
    """How far a rank is, as it tells the store."""

    step: int = 0
    """Steps that are done."""
    order: int = 0
    """Phases begun in this step."""
    phase: str = "start"
    """Name of the phase that it is in."""
    beats: int = 0
    """It gets on as long as this grows."""
    ticks: int = 0
    """Grows as long as its process runs."""


@dataclass
class _Seen:
    """What was last read of another rank, and when it changed."""

    place: Place
    beat_s: float
    tick_s: float


class Watchdog:
    """Watches this rank from `__init__` to `close`. With one rank there is nobody to wait for."""

    def __init__(self, timeout_s: float, give_up: Callable[[str], None]) -> None:
        """`give_up` is called with the reason, from the watching thread, after `timeout_s` seconds in which neither
        this rank nor another got on; it should end the process."""
        self._timeout_s, self._give_up = timeout_s, give_up
        self._interval_s = min(5.0, max(0.2, timeout_s / 10))
        self._place, self._phases = Place(), 0
        self._told, self._beat_s = self._place, time.monotonic()
        self._seen: dict[int, _Seen] = {}
        self._closed = threading.Event()
        self._store: PrefixStore | None = None
        if distributed.world_size() > 1:
            # A connection of its own: the process group's may be waiting for an answer.
            store = TCPStore(
                os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False,
                timeout=timedelta(seconds=2 * self._interval_s),
            )  # fmt: skip
            self._store = PrefixStore("watchdog", store)
            self._tell()  # before the first step: the others' look waits for a rank that has never told its place
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @property
    def place(self) -> Place:
        """Where this rank is."""
        return self._place

    def enter(self, phase: str, step: int) -> None:
        """This rank begins a phase of step `step` (from 0)."""
        self._phases += 1
        self._place = Place(step, self._place.order + 1 if step == self._place.step else 1, phase)

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def missing(self, patience_s: float = 3.0) -> str:
        """Which ranks do not answer, after a look of `patience_s` seconds; for a collective that has failed."""
        if self._store is None:
            return "no other rank"
        self._seen.clear()
        end = time.monotonic() + patience_s
        while time.monotonic() < end:
            if not self._look():
                break
            time.sleep(0.2)
        return self._who(patience_s / 2)

    def _watch(self) -> None:
        while not self._closed.wait(self._interval_s):
            self._tell()
            age_s = time.monotonic() - self._beat_s
            if age_s < self._timeout_s / 2:
                self._seen.clear()
                continue
            self._look()
            quiet_s = self._timeout_s / 2
            if age_s >= self._timeout_s and not self._somebody_gets_on(quiet_s):
                place = self._place
                self._closed.set()
                self._give_up(
                    f"stuck in phase {place.phase} of step {place.step + 1} for {age_s:.0f} s "
                    f"(stuck_timeout_s = {self._timeout_s:g}); {self._who(quiet_s - self._interval_s)}"
                )

    def _tell(self) -> None:
        """This rank's place, for the others."""
        assert self._store is not None
        beats = self._phases + distributed.beats()
        if beats != self._told.beats:
            self._beat_s = time.monotonic()
        self._told = replace(self._place, beats=beats, ticks=self._told.ticks + 1)
        with contextlib.suppress(distributed.DistError):  # rank 0 and its store have gone: _look says so in time
            self._store.set(str(distributed.rank()), json.dumps(asdict(self._told)))

    def _look(self) -> bool:
        """Read the others' places; False where the store does not answer."""
        assert self._store is not None
        others = [r for r in range(distributed.world_size()) if r != distributed.rank()]
        try:
            places = [Place(**json.loads(text)) for text in self._store.multi_get([str(r) for r in others])]
        except distributed.DistError:
            return False
        now = time.monotonic()
        for rank, place in zip(others, places, strict=True):
            old = self._seen.get(rank)
            if old is None:
                self._seen[rank] = _Seen(place, now, now)
            else:
                beat_s = now if place.beats != old.place.beats else old.beat_s
                tick_s = now if place.ticks != old.place.ticks else old.tick_s
                self._seen[rank] = _Seen(place, beat_s, tick_s)
        return True

    def _somebody_gets_on(self, quiet_s: float) -> bool:
        now = time.monotonic()
        return any(now - seen.beat_s < quiet_s - self._interval_s for seen in self._seen.values())

    def _who(self, quiet_s: float) -> str:
        """The ranks that the others wait for, as far as the store tells. `quiet_s`: silence that counts as gone."""
        if not self._look():
            return "rank 0, which holds the trainer's store, does not answer"
        now = time.monotonic()
        silent = [rank for rank, seen in self._seen.items() if now - seen.tick_s >= quiet_s]
        if silent:
            return f"{_ranks(silent)} not arrived: no sign of life"
        mine = self._place
        behind = [r for r, s in self._seen.items() if (s.place.step, s.place.order) < (mine.step, mine.order)]
        if behind:
            where = ", ".join(sorted({f"{self._seen[r].place.phase}" for r in behind}))
            return f"{_ranks(behind)} not arrived: still in phase {where}"
        ahead = [r for r, s in self._seen.items() if (s.place.step, s.place.order) > (mine.step, mine.order)]
        if ahead:
            return f"rank {distributed.rank()} has not arrived where {_ranks(ahead, '')} waits"
        return "every rank is in this phase and answers"


def _ranks(ranks: list[int], verb: str = " has") -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}{verb}"
    shown = ", ".join(str(r) for r in sorted(ranks)[:8]) + (", ..." if len(ranks) > 8 else "")
    return f"ranks {shown}{' have' if verb else ''}"
