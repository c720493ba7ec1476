"""The engine: one queue of requests from all sessions, merged and run on every tensor-parallel rank.

Rank 0 takes requests from the queue in its main thread and broadcasts them in the wire format; the other ranks follow.
While nothing is asked, rank 0 broadcasts an empty message, so that no collective ever times out.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from inference.model.backend import Backend
from inference.protocol import wire
from inference.protocol.arriving import Limits, decode_request
from inference.protocol.wire import Request

logger = logging.getLogger("teacher")

Job = tuple[Request, Future[list[torch.Tensor]]]
KEEP_ALIVE_S = 10.0
DRAIN_S = 10.0
STOPPING = "the server is stopping"
LOG_S = 60.0
_STOP, _IDLE, _WORK = 0, 1, 2
_TRUSTED = Limits(vocab_size=1 << 62, max_positions=1 << 62)
"""Between our own ranks: rank 0 has checked the request against the real limits."""


@dataclass
class Load:
    """What was done since the last log line."""

    requests: int = 0
    tokens: int = 0
    busy_s: float = 0.0
    since: float = field(default_factory=time.monotonic)


class Engine:
    """Rank 0's side."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._queue: queue.Queue[Job] = queue.Queue()
        self._held: list[Job] = []
        self._load = Load()
        self._lock = threading.Lock()
        self._stopped = False

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of request that the backend answers."""
        return tuple(kind for kind in wire.KINDS if hasattr(self._backend, kind))

    def submit(self, request: Request) -> Future[list[torch.Tensor]]:
        """Queue a request; called from session threads. WireError where the backend does not do this."""
        if not hasattr(self._backend, request.kind):
            raise wire.WireError(f"this teacher's backend has no {request.kind!r}")
        future: Future[list[torch.Tensor]] = Future()
        with self._lock:
            if self._stopped:
                raise RuntimeError(STOPPING)
            self._queue.put((request, future))
        return future

    def run(self, stopping: threading.Event, sessions: Callable[[], int]) -> None:
        """Serve until `stopping` is set; from then on nothing is taken, and what was is answered for DRAIN_S more
        seconds at most. Runs in the main thread."""
        last_broadcast = time.monotonic()
        deadline = float("inf")
        while True:
            if stopping.is_set() and not self._stopped:
                deadline = time.monotonic() + DRAIN_S
                with self._lock:
                    self._stopped = True
            batch = self._next_batch() if time.monotonic() < deadline else []
            if batch:
                self._work(batch)
                last_broadcast = time.monotonic()
            elif self._stopped:
                break
            elif time.monotonic() - last_broadcast > KEEP_ALIVE_S:
                _broadcast(_IDLE)
                last_broadcast = time.monotonic()
            if time.monotonic() - self._load.since > LOG_S:
                self._log(sessions())
        while not self._queue.empty():
            self._held.append(self._queue.get())
        for _, future in self._held:
            future.set_exception(RuntimeError(STOPPING))
        _broadcast(_STOP)

    def _next_batch(self) -> list[Job]:
        """The oldest request and every waiting one that can run with it, up to the token budget of a merge."""
        if not self._held:
            try:
                self._held.append(self._queue.get(timeout=0.2))
            except queue.Empty:
                return []
        while not self._queue.empty():
            self._held.append(self._queue.get())
        batch: list[Job] = []
        left = []
        tokens = 0
        for item in self._held:
            size = _cost(item[0])
            if not batch or (_mergeable(batch[0][0], item[0]) and tokens + size <= wire.PART_TOKENS):
                batch.append(item)
                tokens += size
            else:
                left.append(item)
        self._held = left
        return batch

    def _work(self, batch: list[Job]) -> None:
        requests = [request for request, _ in batch]
        merged = _merge(requests)
        start = time.monotonic()
        header, payload = wire.encode_request(merged)
        _broadcast(_WORK, payload.numel())
        dist.broadcast(header, 0)
        dist.broadcast(payload, 0)
        try:
            tensors = getattr(self._backend, merged.kind)(merged)  # a backend has a method for each kind
        except (wire.StateLost, wire.WireError, wire.Unavailable) as error:
            if len(batch) > 1 and isinstance(error, wire.WireError):  # the others are not to pay for the one it is of
                for job in batch:
                    self._work([job])
                return
            for _, future in batch:
                future.set_exception(error)
            return
        self._load.busy_s += time.monotonic() - start
        self._load.requests += len(batch)
        self._load.tokens += _cost(merged)
        if len(batch) == 1:
            batch[0][1].set_result(tensors)
            return
        sizes = [request.response_tokens for request in requests]
        parts = [tensor.split(sizes) for tensor in tensors]
        for i, (_, future) in enumerate(batch):
            future.set_result([part[i] for part in parts])

    def _log(self, sessions: int) -> None:
        load, self._load = self._load, Load()
        seconds = time.monotonic() - load.since
        logger.info(
            "%d sessions, %d requests, %d tokens, %.0f tokens/s, busy %.0f %%, %d waiting",
            sessions,
            load.requests,
            load.tokens,
            load.tokens / seconds,
            100 * load.busy_s / seconds,
            self._queue.qsize() + len(self._held),
        )


def follow(backend: Backend) -> None:
    """The other ranks' side: do what rank 0 broadcasts until it says stop."""
    while True:
        control = torch.zeros(2, dtype=torch.int64)
        dist.broadcast(control, 0)
        operation, size = control.tolist()
        if operation == _STOP:
            return
        if operation == _WORK:
            header, payload = torch.zeros(wire.HEADER_WORDS, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)
            dist.broadcast(header, 0)
            dist.broadcast(payload, 0)
            request = decode_request(header.tolist(), payload, _TRUSTED)
            with contextlib.suppress(wire.StateLost):  # every rank comes to the same answer
                getattr(backend, request.kind)(request)


def _broadcast(operation: int, size: int = 0) -> None:
    dist.broadcast(torch.tensor([operation, size], dtype=torch.int64), 0)


def _cost(request: Request) -> int:
    """Tokens that go through the model."""
    if request.kind == "next":
        return len(request.rows_A)
    return sum(group.input_tokens for group in request.groups)


def _mergeable(first: Request, other: Request) -> bool:
    """Whether two requests can be one: the same question of different groups."""
    # hidden states do not depend on the temperature
    return (
        first.kind == other.kind in wire.TOKEN_KINDS
        and first.k == other.k
        and (first.kind == "hidden" or first.temperature == other.temperature)
    )


def _merge(requests: list[Request]) -> Request:
    """One request with all groups, renumbered in order."""
    if len(requests) == 1:
        return requests[0]
    return replace(requests[0], groups=wire.renumbered(group for request in requests for group in request.groups))
