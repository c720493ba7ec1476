"""The client: asks the teacher from a training process. Every question returns a future at once.

A worker thread sends and receives. When the connection breaks it reconnects, to a restarted server too, and sends the
same request again; requests change nothing on the server, so this is safe. After `timeout_s` without any success the
future gets `TeacherLost`.
"""

from __future__ import annotations

import contextlib
import queue
import secrets
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from inference.attention.packing import Group
from inference.protocol import session, wire
from inference.protocol.connection import CLOSED, RETRY_S, Connector, TeacherLost, TeacherRefused
from inference.protocol.decoding import Make, Replay, TeacherDecoding
from inference.protocol.replies import TeacherInfo
from inference.protocol.session import Channel
from inference.protocol.wire import Request

__all__ = ["TeacherClient", "TeacherDecoding", "TeacherInfo", "TeacherLost", "TeacherRefused"]


@dataclass(frozen=True)
class _Job:
    request: Request
    make: Make
    replay: Replay | None
    future: Future[Any]


class TeacherClient:
    """A connection to the teacher. The constructor connects, and raises if the two do not fit together."""

    def __init__(
        self, address: str, *, secret: str, tokenizer_fingerprint: str | None, timeout_s: float, prefer: int = 0
    ) -> None:
        """`address` as in teacher.address: host:port, an address file, or several of them with commas between.

        Of several replicas the one numbered `prefer` (modulo their count) is asked first: give each rank its own
        number. `tokenizer_fingerprint` None: the client talks in the teacher's tokens whatever its own are.
        """
        self._timeout_s = timeout_s
        self._connector = Connector(
            address, secret=secret, tokenizer_fingerprint=tokenizer_fingerprint, timeout_s=timeout_s, prefer=prefer
        )
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._channel: Channel | None = self._connector.open(time.monotonic() + timeout_s, "never connected")
        self._thread = threading.Thread(target=self._work, name="teacher-client", daemon=True)
        self._thread.start()

    def info(self) -> TeacherInfo:
        """What the server said in the last handshake."""
        assert self._connector.info is not None
        return self._connector.info

    def score(self, groups: Sequence[Group], temperature: float = 1.0) -> Future[torch.Tensor]:
        """float32 [S] log p(token | prompt, tokens before it), nats, of all response tokens in batch order."""
        return self._ask(Request("score", _in_order(groups), temperature), lambda t: t[0][:, 0])

    def hidden(self, groups: Sequence[Group]) -> Future[torch.Tensor]:
        """[S, Hidden] in the teacher's dtype, states after the final norm that predict each response token: hidden @
        output_layer.T are the logits."""
        return self._ask(Request("hidden", _in_order(groups)), lambda t: t[0])

    def topk(self, groups: Sequence[Group], k: int, temperature: float = 1.0) -> Future[list[torch.Tensor]]:
        """The k likeliest entries before each response token: float32 [S, K] log-probabilities, descending, and int64
        [S, K] ids. The rest of the mass is 1 - sum(exp)."""
        return self._ask(Request("topk", _in_order(groups), temperature, k), lambda t: t)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        eos_ids: Sequence[int] | None = None,
        seed: int = 0,
        numbers: Sequence[int] = (),
    ) -> Future[list[tuple[int, ...]]]:
        """An answer to each prompt, an ending id included; temperature 0 is greedy. `eos_ids` None: the teacher's
        own. Random numbers belong to the seed and the answer's number; by default, its place."""
        request = Request(
            "answer",
            tuple(Group(tuple(prompt), ()) for prompt in prompts),
            temperature,
            max_new_tokens=max_new_tokens,
            seed=seed,
            rows_A=tuple(numbers),
            ids=tuple(self.info().eos_ids if eos_ids is None else eos_ids),
        )
        return self._ask(request, _answers)

    def decode(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, samples: int = 1) -> TeacherDecoding:
        """Token by token beside the caller, who chooses each token: `samples` responses to each prompt.

        A session holds one decoding: a new one ends the one before.
        """
        opening = Request(
            "open",
            tuple(Group(tuple(prompt), ((),) * samples, n * samples) for n, prompt in enumerate(prompts)),
            samples=samples,
            max_new_tokens=max_new_tokens,
            handle=secrets.randbits(62) + 1,
            rows_A=tuple(range(len(prompts) * samples)),
        )
        return TeacherDecoding(self._ask, opening)

    def close(self) -> None:
        """End the session; what was not answered yet gets TeacherLost."""
        self._connector.closed.set()
        self._jobs.put(None)
        self._thread.join(timeout=2.0)
        self._fail_waiting()

    def __enter__(self) -> TeacherClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, request: Request, make: Make, replay: Replay | None = None) -> Future[Any]:
        future: Future[Any] = Future()
        if request.kind in wire.GROUP_KINDS and not request.groups:
            raise ValueError(f"{request.kind}: no groups")
        if self._connector.closed.is_set():
            future.set_exception(TeacherLost(CLOSED))
        else:
            self._jobs.put(_Job(request, make, replay, future))
        return future

    def _work(self) -> None:
        """The worker thread: one request at a time, a ping when there is none."""
        while not self._connector.closed.is_set():
            try:
                job = self._jobs.get(timeout=session.PING_S)
            except queue.Empty:
                # A broken connection is mended when somebody asks.
                if self._channel is not None:
                    try:
                        _exchange(self._channel, Request("ping"), session.CONNECT_S)
                    except (RuntimeError, ValueError):
                        self._channel = None
                continue
            if job is None or not job.future.set_running_or_notify_cancel():
                continue
            try:
                parts = [self._persist(request, job.replay) for request in wire.in_parts(job.request)]
                whole = parts[0] if len(parts) == 1 else [torch.cat(t) for t in zip(*parts, strict=True)]
                job.future.set_result(job.make(whole))
            except Exception as error:
                job.future.set_exception(error)
        self._channel = None
        self._fail_waiting()

    def _fail_waiting(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                job = self._jobs.get_nowait()
                if job is not None and job.future.set_running_or_notify_cancel():
                    job.future.set_exception(TeacherLost(CLOSED))

    def _persist(self, request: Request, replay: Replay | None) -> list[torch.Tensor]:
        """Ask until there is an answer, over as many connections as it takes."""
        deadline = time.monotonic() + self._timeout_s
        reason = "not connected"
        while True:
            if self._channel is None:
                self._channel = self._connector.open(deadline, reason)
            try:
                return _exchange(self._channel, request, max(1.0, deadline - time.monotonic()))
            except wire.StateLost as error:
                if replay is None:
                    raise TeacherRefused(str(error)) from error
                request = replay()
            except TeacherRefused:
                self._channel = None  # the server ends a session that it refuses
                raise
            except RuntimeError as error:
                self._channel = None
                reason = session.one_line(error)
                if time.monotonic() + RETRY_S > deadline:  # it can be reached, and has more to do with each time
                    raise TeacherLost(
                        f"the teacher at {self._connector.address} has not answered for {self._timeout_s:.0f} s "
                        f"(teacher.timeout_s): {reason}"
                    ) from error


def _exchange(channel: Channel, request: Request, timeout_s: float) -> list[torch.Tensor]:
    """One request and its reply."""
    encoded = wire.encode_request(request)
    try:
        # The server would refuse such a header before it reads on, while this side still waits to send.
        wire.request_payload_size(encoded[0].tolist())
    except wire.WireError as error:
        raise TeacherRefused(str(error)) from error
    channel.send(encoded, timeout_s)
    words = channel.receive_header(timeout_s)
    if words[2] != wire.OK:
        if not 2 <= words[4] <= wire.MAX_JSON_BYTES:
            raise wire.WireError("malformed error reply")
        message = str(wire.decode_json(channel.receive(words[4], torch.uint8, timeout_s)).get("error"))
        raise wire.StateLost(message) if words[2] == wire.STATE_LOST else TeacherRefused(message)
    tensors = []
    for dtype, rows, columns in wire.reply_layout(words):
        data = channel.receive(rows * columns * dtype.itemsize, torch.uint8, timeout_s)
        tensors.append(data.view(dtype).view(rows, columns))
    return tensors


def _in_order(groups: Sequence[Group]) -> tuple[Group, ...]:
    return tuple(sorted(groups, key=lambda group: group.first_response))


def _answers(tensors: list[torch.Tensor]) -> list[tuple[int, ...]]:
    lengths, tokens = tensors[0][:, 0].tolist(), tensors[1][:, 0]
    return [tuple(part.tolist()) for part in tokens.split(lengths)]
