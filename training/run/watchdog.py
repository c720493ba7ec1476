"""Who has not arrived? A thread of each rank that ends it when no rank gets on any more.

A rank that is stopped, or whose node is lost, leaves the others in a collective, most often in one of DeepSpeed's.
torch's `monitored_barrier` names the ranks that do not come to a barrier of its own, and its time-outs say neither in
which phase nor for whom they waited; gloo's ends only the call, NCCL's not the process that is stuck. So each rank
tells the trainer's store how far it is, and one that has waited too long looks there.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, TCPStore

from training import distributed
from training.run.safe_points import Place, SafePoints


@dataclass(frozen=True)
class Told(Place):
    """What a rank tells the store."""

    beats: int = 0
    """It gets on as long as this grows."""
    ticks: int = 0
    """Grows as long as its process runs."""


Places = dict[int, Told]
"""Of the other ranks."""


class Watchdog:
    """Watches this rank from `__init__` on. With one rank there is nobody to wait for."""

    def __init__(self, timeout_s: float, points: SafePoints, give_up: Callable[[str], None]) -> None:
        """`points` say where this rank is. `give_up` is called with the reason, from the watching thread, when this
        rank has not got on for `timeout_s` seconds and no other for the last half of them; it should end the process.
        """
        self._timeout_s, self._points, self._give_up = timeout_s, points, give_up
        self._interval_s = min(1.0, max(0.2, timeout_s / 10))
        self._told, self._beat_s = Told(), time.monotonic()
        self._resting = threading.Event()
        self._store: PrefixStore | None = None
        if distributed.world_size() > 1:
            # A connection of its own: the process group's may be waiting for an answer.
            patience = timedelta(seconds=2 * self._interval_s)
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=patience)
            self._store = PrefixStore("watchdog", store)
            self._tell()  # before the first step: the others' look waits for a rank that has never told its place
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def rest(self) -> None:
        """Nobody is waited for any more: what a rank still does, it does alone."""
        self._resting.set()

    def missing(self) -> str:
        """Which ranks do not answer, after a look of some seconds; for a collective that has failed."""
        if self._store is None:
            return "no other rank"
        before = self._look()
        time.sleep(3 * self._interval_s)
        return self._who(before, self._look())

    def _watch(self) -> None:
        before, looked_s = None, 0.0
        while not self._resting.wait(self._interval_s):
            self._tell()
            now = time.monotonic()
            age_s = now - self._beat_s
            if age_s < self._timeout_s / 2:
                looked_s = 0.0
            elif looked_s == 0.0:
                before, looked_s = self._look(), now
            elif now - looked_s >= self._timeout_s / 2:
                after = self._look()
                if any(place.beats != (before or {}).get(rank, place).beats for rank, place in (after or {}).items()):
                    before, looked_s = after, now  # another rank gets on, and this one waits for it
                    continue
                place = self._points.place
                self._give_up(
                    f"stuck in phase {place.phase} of step {place.step + 1} for {age_s:.0f} s "
                    f"(stuck_timeout_s = {self._timeout_s:g}); {self._who(before, after)}"
                )
                return

    def _tell(self) -> None:
        """This rank's place, for the others."""
        assert self._store is not None
        place = self._points.place
        beats = place.begun + distributed.beats()
        if beats != self._told.beats:
            self._beat_s = time.monotonic()
        self._told = Told(**vars(place), beats=beats, ticks=self._told.ticks + 1)
        with contextlib.suppress(distributed.DistError):  # rank 0 and its store have gone: _look says so in time
            self._store.set(str(distributed.rank()), json.dumps(asdict(self._told)))

    def _look(self) -> Places | None:
        """The others' places; None where the store does not answer."""
        assert self._store is not None
        others = [rank for rank in range(distributed.world_size()) if rank != distributed.rank()]
        try:
            texts = self._store.multi_get([str(rank) for rank in others])
        except distributed.DistError:
            return None
        return {rank: Told(**json.loads(text)) for rank, text in zip(others, texts, strict=True)}

    def _who(self, before: Places | None, after: Places | None) -> str:
        """The ranks that the others wait for, from two looks some ticks apart."""
        if after is None:
            return "rank 0, which holds the trainer's store, does not answer"
        silent = [rank for rank, place in (before or {}).items() if after[rank].ticks == place.ticks]
        if silent:
            return f"{_ranks(silent, 'has', 'have')} not arrived: no sign of life"
        mine = self._points.place.begun
        behind = [rank for rank, place in after.items() if place.begun < mine]
        if behind:
            phases = ", ".join(sorted({after[rank].phase for rank in behind}))
            return f"{_ranks(behind, 'has', 'have')} not arrived: still in phase {phases}"
        ahead = [rank for rank, place in after.items() if place.begun > mine]
        if ahead:
            return f"rank {distributed.rank()} has not arrived where {_ranks(ahead, 'waits', 'wait')}"
        return "every rank is in this phase and answers"


def _ranks(ranks: Sequence[int], one: str, several: str) -> str:
    """`rank 3 has`, `ranks 1, 2, 3 have`."""
    if len(ranks) == 1:
        return f"rank {ranks[0]} {one}"
    return f"ranks {', '.join(map(str, ranks[:8]))}{', ...' if len(ranks) > 8 else ''} {several}"
