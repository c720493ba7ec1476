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
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from inference import session, wire
from inference.connection import CLOSED, Connector, TeacherLost, TeacherRefused, one_line
from inference.packing import Group
from inference.replies import (
    TeacherAnswers,
    TeacherGather,
    TeacherHidden,
    TeacherInfo,
    TeacherNext,
    TeacherScore,
    TeacherTopK,
)
from inference.session import Channel
from inference.wire import Request

__all__ = ["TeacherClient", "TeacherDecoding", "TeacherInfo", "TeacherLost", "TeacherRefused"]

T = TypeVar("T")


@dataclass(frozen=True)
class _Job:
    request: Request
    make: Callable[[list[torch.Tensor]], Any]
    future: Future[Any]
    replay: Callable[[], Request] | None
    """The request that gives the same answer on a server that has lost the decoding."""


class TeacherClient:
    """A connection to the teacher. The constructor connects, and raises if the two do not fit together."""

    def __init__(
        self,
        address: str,
        *,
        secret: str,
        tokenizer_fingerprint: str | None,
        timeout_s: float,
        prefer: int = 0,
        vocab_size: int | None = None,
        dtype: str | None = None,
        temperature: float | None = None,
        max_reply_bytes: int = 1 << 36,
    ) -> None:
        """`address` as in teacher.address: host:port, an address file, or several of them with commas between.

        Of several replicas the one numbered `prefer` (modulo their count) is asked first: give each rank its own
        number. What is None is not compared in the handshake; a given `temperature` is then the only one that this
        client can ask for.
        """
        expected = {
            "tokenizer_fingerprint": tokenizer_fingerprint,
            "vocab_size": vocab_size,
            "dtype": dtype,
            "temperature": temperature,
        }
        self._timeout_s = timeout_s
        self._connector = Connector(address, prefer=prefer, secret=secret, timeout_s=timeout_s, expected=expected)
        self._max_reply_bytes = max_reply_bytes
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._channel: Channel | None = self._connector.open(time.monotonic() + timeout_s, "never connected")
        self._thread = threading.Thread(target=self._work, name="teacher-client", daemon=True)
        self._thread.start()

    def info(self) -> TeacherInfo:
        """What the server said in the last handshake."""
        assert self._connector.info is not None
        return self._connector.info

    @property
    def address(self) -> str:
        """The replica that is asked now."""
        return self._connector.address

    def ping(self) -> Future[None]:
        """Done when the server has answered."""
        return self._ask(Request("ping"), lambda _: None)

    def score(self, groups: Sequence[Group], temperature: float = 1.0) -> Future[TeacherScore]:
        """Log-probabilities of all response tokens."""
        ordered, lengths = _in_order(groups)
        request = Request("score", ordered, temperature)
        return self._ask(request, lambda t: TeacherScore(lengths, t[0][:, 0]))

    def hidden(self, groups: Sequence[Group]) -> Future[TeacherHidden]:
        """Final hidden states before all response tokens."""
        ordered, lengths = _in_order(groups)
        return self._ask(Request("hidden", ordered), lambda t: TeacherHidden(lengths, t[0]))

    def topk(self, groups: Sequence[Group], k: int, temperature: float = 1.0) -> Future[TeacherTopK]:
        """The k likeliest entries before each response token."""
        ordered, lengths = _in_order(groups)
        request = Request("topk", ordered, temperature, k=k)
        return self._ask(request, lambda t: TeacherTopK(lengths, t[0], t[1], t[2][:, 0]))

    def gather(self, groups: Sequence[Group], ids_SK: torch.Tensor, temperature: float = 1.0) -> Future[TeacherGather]:
        """Log-probabilities at `ids_SK` (int64 [S, K], in batch order) before each response token."""
        ordered, lengths = _in_order(groups)
        extras = tuple(ids_SK.reshape(-1).tolist())
        request = Request("gather", ordered, temperature, k=ids_SK.shape[1], extras=extras)
        return self._ask(request, lambda t: TeacherGather(lengths, t[0], t[1][:, 0]))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        samples: int = 1,
        temperature: float = 0.0,
        eos_ids: Sequence[int] | None = None,
        seed: int = 0,
    ) -> Future[TeacherAnswers]:
        """`samples` answers to each prompt; temperature 0 is greedy. `eos_ids` None: the teacher's own."""
        ends = self.info().eos_ids if eos_ids is None else eos_ids
        groups = tuple(Group(tuple(prompt), ()) for prompt in prompts)
        request = Request(
            "generate",
            groups,
            temperature,
            samples=samples,
            max_new_tokens=max_new_tokens,
            seed=seed,
            extras=tuple(ends),
        )
        return self._ask(request, _answers)

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        samples: int = 1,
        k: int = 0,
        temperature: float = 1.0,
    ) -> TeacherDecoding:
        """Token by token beside the caller, who chooses each token: `samples` responses to each prompt.

        Each step gives the K likeliest entries; K = V is the whole distribution, K = 0 the hidden states in its place.
        A session holds one decoding: a new one ends the one before.
        """
        return TeacherDecoding(self._ask, prompts, samples, max_new_tokens, k, temperature)

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

    def _ask(
        self,
        request: Request,
        make: Callable[[list[torch.Tensor]], T],
        replay: Callable[[], Request] | None = None,
    ) -> Future[T]:
        future: Future[T] = Future()
        if request.kind in wire.GROUP_KINDS and not request.groups:
            raise ValueError(f"{request.kind}: no groups")
        if self._connector.closed.is_set():
            future.set_exception(TeacherLost(CLOSED))
        else:
            self._jobs.put(_Job(request, make, future, replay))
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
                        self._exchange(self._channel, Request("ping"), session.CONNECT_S)
                    except (RuntimeError, ValueError):
                        self._channel = None
                continue
            if job is None or not job.future.set_running_or_notify_cancel():
                continue
            try:
                job.future.set_result(job.make(self._persist(job)))
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

    def _persist(self, job: _Job) -> list[torch.Tensor]:
        """Ask until there is an answer, over as many connections as it takes."""
        deadline = time.monotonic() + self._timeout_s
        reason, request = "not connected", job.request
        while True:
            if self._channel is None:
                self._channel = self._connector.open(deadline, reason)
            try:
                return self._exchange(self._channel, request, max(1.0, deadline - time.monotonic()))
            except wire.StateLost as error:
                if job.replay is None:
                    raise TeacherRefused(str(error)) from error
                request = job.replay()
            except TeacherRefused:
                self._channel = None  # the server ends a session that it refuses
                raise
            except RuntimeError as error:
                self._channel = None
                reason = one_line(error)

    def _exchange(self, channel: Channel, request: Request, timeout_s: float) -> list[torch.Tensor]:
        """One request and its reply."""
        encoded = wire.encode_request(request)
        self._check_size(encoded[0].tolist())
        channel.send(encoded, timeout_s)
        words = channel.receive_header(timeout_s)
        if words[2] != 0:
            if not 2 <= words[4] <= wire.MAX_JSON_BYTES:
                raise wire.WireError("malformed error reply")
            message = str(wire.decode_json(channel.receive(words[4], torch.uint8, timeout_s)).get("error"))
            raise wire.StateLost(message) if words[2] == wire.STATE_LOST else TeacherRefused(message)
        tensors = []
        for dtype, rows, columns in wire.reply_layout(words, self._max_reply_bytes):
            data = channel.receive(rows * columns * dtype.itemsize, torch.uint8, timeout_s)
            tensors.append(data.view(dtype).view(rows, columns))
        return tensors

    def _check_size(self, words: list[int]) -> None:
        """The server would refuse such a header before it reads on, while this side still waits to send."""
        info = self.info()
        limits = wire.Limits(info.max_request_tokens, info.max_request_rows, info.vocab_size, info.max_positions)
        try:
            wire.request_payload_size(words, limits)
        except wire.WireError as error:
            raise TeacherRefused(str(error)) from error


class TeacherDecoding:
    """Responses that grow by one token a step. `first` is the distribution before any token."""

    def __init__(
        self,
        ask: Callable[[Request, Callable[[list[torch.Tensor]], Any], Callable[[], Request] | None], Future[Any]],
        prompts: Sequence[Sequence[int]],
        samples: int,
        max_new_tokens: int,
        k: int,
        temperature: float,
    ) -> None:
        self._ask = ask
        self._prompts = [tuple(prompt) for prompt in prompts]
        self._samples, self._max_new, self._k, self._temperature = samples, max_new_tokens, k, temperature
        self._handle = secrets.randbits(62) + 1
        self._tokens: list[list[int]] = [[] for _ in range(len(self._prompts) * samples)]
        self._step = 0
        everyone = tuple(range(len(self._tokens)))
        self.first: Future[TeacherNext] = ask(self._opening(everyone, 0), self._make(everyone), None)

    def next(self, rows: Sequence[int], tokens: Sequence[int]) -> Future[TeacherNext]:
        """The distribution after `tokens[i]` was chosen for response `rows[i]`; rows ascend.

        A row that is left out is finished and must not come back.
        """
        kept, step = tuple(rows), self._step
        chosen = tuple(tokens)
        for row, token in zip(kept, chosen, strict=True):
            if len(self._tokens[row]) != step:
                raise ValueError(f"response {row} was left out of an earlier step")
            self._tokens[row].append(token)
        self._step += 1
        request = Request(
            "next", temperature=self._temperature, k=self._k, extras=kept + chosen, handle=self._handle, step=step
        )
        return self._ask(request, self._make(kept), lambda: self._opening(kept, step + 1))

    def close(self) -> Future[None]:
        """Give the server's memory back; a new decoding or the end of the session does that too."""
        return self._ask(Request("release", handle=self._handle), lambda _: None, None)

    def _opening(self, rows: tuple[int, ...], step: int) -> Request:
        """The request that starts this decoding, or brings it back to where `rows` have `step` tokens."""
        alive = set(rows)
        groups = []
        for n, prompt in enumerate(self._prompts):
            first = n * self._samples
            mine = range(first, first + self._samples)
            responses = tuple(tuple(self._tokens[b][:step]) if b in alive else () for b in mine)
            groups.append(Group(prompt, responses, first))
        return Request(
            "open",
            tuple(groups),
            self._temperature,
            k=self._k,
            samples=self._samples,
            max_new_tokens=self._max_new,
            extras=rows,
            handle=self._handle,
            step=step,
        )

    def _make(self, rows: tuple[int, ...]) -> Callable[[list[torch.Tensor]], TeacherNext]:
        rows_A = torch.tensor(rows, dtype=torch.int64)
        nothing = torch.zeros(len(rows), 0)

        def make(tensors: list[torch.Tensor]) -> TeacherNext:
            if self._k == 0:
                return TeacherNext(rows_A, nothing, nothing.long(), nothing.sum(1), tensors[0])
            return TeacherNext(rows_A, tensors[0], tensors[1], tensors[2][:, 0], nothing)

        return make


def _in_order(groups: Sequence[Group]) -> tuple[tuple[Group, ...], torch.Tensor]:
    """The groups in batch order, and the lengths of their responses."""
    ordered = tuple(sorted(groups, key=lambda group: group.first_response))
    return ordered, torch.tensor([len(r) for group in ordered for r in group.responses], dtype=torch.int64)


def _answers(tensors: list[torch.Tensor]) -> TeacherAnswers:
    lengths, tokens = tensors[0][:, 0].tolist(), tensors[1][:, 0].tolist()
    responses, at = [], 0
    for length in lengths:
        responses.append(tuple(tokens[at : at + length]))
        at += length
    return TeacherAnswers(tuple(responses))
