"""The client: asks the teacher from a training process. Every question returns a future at once.

A worker thread sends and receives. When the connection breaks it reconnects, to a restarted server too, and sends the
same request again; requests change nothing on the server, so this is safe. After `timeout_s` without any success the
future gets `TeacherLost`.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch

from inference import session, wire
from inference.packing import Group
from inference.session import Channel
from inference.wire import Request

T = TypeVar("T")
RETRY_S = 0.3
_CLOSED = "the client was closed"


class TeacherLost(RuntimeError):
    """The teacher could not be reached for `timeout_s` seconds."""


class TeacherRefused(ValueError):
    """The teacher is there but will not serve this client, or this request: the message says why."""


@dataclass(frozen=True)
class TeacherInfo:
    """What the teacher says of itself."""

    model: str
    """Name of the model directory."""
    model_dir: str
    """Its path on the server's machine."""
    vocab_size: int
    hidden_size: int
    dtype: str
    """float32 or bfloat16: type of the model and of `hidden`."""
    tensor_parallel: int
    max_positions: int
    """Longest prompt plus response, in tokens."""
    max_request_tokens: int
    """Tokens that one request may carry."""
    max_request_rows: int
    """Responses that one request may carry."""
    eos_ids: tuple[int, ...]
    tokenizer_fingerprint: str
    vocabulary_fingerprint: str
    output_layer: dict[str, Any]
    """As inference/output_layer.py describes it: tensor, file, shape, hash of sampled rows."""


@dataclass(frozen=True)
class Scored:
    """Values for S response tokens, in batch order (b, then t)."""

    lengths_B: torch.Tensor
    """int64 [B] response lengths; they sum to S."""

    def padded(self, values_S: torch.Tensor, length: int | None = None) -> torch.Tensor:
        """[B, R, ...] from [S, ...], zero beyond each response. R is the longest response unless given."""
        lengths = self.lengths_B
        R = int(lengths.max()) if length is None and len(lengths) else length or 0
        mask_BR = torch.arange(R)[None, :] < lengths[:, None]
        out = values_S.new_zeros(len(lengths), R, *values_S.shape[1:])
        out[mask_BR] = values_S
        return out


@dataclass(frozen=True)
class TeacherScore(Scored):
    """log p(token | prompt, tokens before it)."""

    logprobs_S: torch.Tensor
    """float32 [S] nats."""


@dataclass(frozen=True)
class TeacherTopK(Scored):
    """The K likeliest entries before each response token. The rest of the mass is 1 - sum(exp(logprobs_SK))."""

    logprobs_SK: torch.Tensor
    """float32 [S, K] nats, descending."""
    ids_SK: torch.Tensor
    """int64 [S, K]."""
    logsumexp_S: torch.Tensor
    """float32 [S] logsumexp of all logits divided by the temperature."""


@dataclass(frozen=True)
class TeacherGather(Scored):
    """Log-probabilities at the ids that were asked for."""

    logprobs_SK: torch.Tensor
    """float32 [S, K] nats."""
    logsumexp_S: torch.Tensor
    """float32 [S] logsumexp of all logits divided by the temperature."""


@dataclass(frozen=True)
class TeacherHidden(Scored):
    """States after the final norm that predict each response token: hidden @ output_layer.T are the logits."""

    hidden_SH: torch.Tensor
    """[S, Hidden] in the teacher's dtype."""


@dataclass(frozen=True)
class TeacherAnswers:
    """Generated answers."""

    responses: tuple[tuple[int, ...], ...]
    """Token ids of B = N * samples answers, ordered by prompt; an ending id is included."""


@dataclass(frozen=True)
class _Job:
    request: Request
    make: Callable[[list[torch.Tensor]], Any]
    future: Future[Any]


class TeacherClient:
    """A connection to the teacher. The constructor connects, and raises if the two do not fit together."""

    def __init__(
        self,
        address: str,
        *,
        secret: str,
        tokenizer_fingerprint: str | None,
        timeout_s: float,
        vocab_size: int | None = None,
        dtype: str | None = None,
        temperature: float | None = None,
        max_reply_bytes: int = 1 << 36,
    ) -> None:
        """`address` is host:port or the path of an address file. What is None is not compared in the handshake.

        A given `temperature` is then the only one that this client can ask for.
        """
        self._address, self._secret, self._timeout_s = address, secret, timeout_s
        self._expected = {
            "tokenizer_fingerprint": tokenizer_fingerprint,
            "vocab_size": vocab_size,
            "dtype": dtype,
            "temperature": temperature,
        }
        self._max_reply_bytes = max_reply_bytes
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._closed = threading.Event()
        self._last_success = time.monotonic()
        self._channel: Channel | None = None
        self._info: TeacherInfo | None = None
        self._channel = self._reconnect(time.monotonic() + timeout_s, "never connected")
        self._thread = threading.Thread(target=self._work, name="teacher-client", daemon=True)
        self._thread.start()

    def info(self) -> TeacherInfo:
        """What the server said in the last handshake."""
        assert self._info is not None
        return self._info

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

    def close(self) -> None:
        """End the session; what was not answered yet gets TeacherLost."""
        self._closed.set()
        self._jobs.put(None)
        self._thread.join(timeout=2.0)
        self._fail_waiting()

    def __enter__(self) -> TeacherClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, request: Request, make: Callable[[list[torch.Tensor]], T]) -> Future[T]:
        future: Future[T] = Future()
        if request.kind in wire.GROUP_KINDS and not request.groups:
            raise ValueError(f"{request.kind}: no groups")
        if self._closed.is_set():
            future.set_exception(TeacherLost(_CLOSED))
        else:
            self._jobs.put(_Job(request, make, future))
        return future

    def _work(self) -> None:
        """The worker thread: one request at a time, a ping when there is none."""
        while not self._closed.is_set():
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
                job.future.set_result(job.make(self._persist(job.request)))
            except Exception as error:
                job.future.set_exception(error)
        self._channel = None
        self._fail_waiting()

    def _fail_waiting(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                job = self._jobs.get_nowait()
                if job is not None and job.future.set_running_or_notify_cancel():
                    job.future.set_exception(TeacherLost(_CLOSED))

    def _persist(self, request: Request) -> list[torch.Tensor]:
        """Ask until there is an answer, over as many connections as it takes."""
        deadline = time.monotonic() + self._timeout_s
        reason = "not connected"
        while True:
            if self._channel is None:
                self._channel = self._reconnect(deadline, reason)
            try:
                return self._exchange(self._channel, request, max(1.0, deadline - time.monotonic()))
            except TeacherRefused:
                self._channel = None  # the server ends a session that it refuses
                raise
            except RuntimeError as error:
                self._channel = None
                reason = " ".join(str(error).split())[:200]

    def _exchange(self, channel: Channel, request: Request, timeout_s: float) -> list[torch.Tensor]:
        """One request and its reply."""
        message = wire.encode_request(request)
        self._check_size(message[0].tolist())
        channel.send(message, timeout_s)
        words = channel.receive_header(timeout_s)
        if words[2] != 0:
            if not 2 <= words[4] <= wire.MAX_JSON_BYTES:
                raise wire.WireError("malformed error reply")
            raise TeacherRefused(wire.decode_json(channel.receive(words[4], torch.uint8, timeout_s)).get("error"))
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

    def _reconnect(self, deadline: float, reason: str) -> Channel:
        """Connect and shake hands, again and again until the deadline; TeacherRefused at once."""
        while True:
            if self._closed.is_set():
                raise TeacherLost(_CLOSED)
            try:
                return self._connect()
            except TeacherRefused:
                raise
            except (RuntimeError, OSError, ValueError) as error:
                reason = " ".join(str(error).split())[:200]
            if time.monotonic() + RETRY_S > deadline:
                raise TeacherLost(f"no teacher at {self._address} for {self._timeout_s:.0f} s: {reason}")
            time.sleep(RETRY_S)

    def _connect(self) -> Channel:
        host, port = resolve(self._address)
        # Knock first: TCPStore would print warnings for as long as nobody listens.
        socket.create_connection((host, port), timeout=session.CONNECT_S).close()
        store = session.c10d.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=session.CONNECT_S))
        name, nonce = session.new_nonce(), session.new_nonce()
        number = store.add(session.COUNTER, 1)
        hello = {"session": name, "nonce": nonce, "version": wire.VERSION}
        session.put(store, session.announcement(number), hello)
        challenge = session.take(store, session.key(name, "challenge"))
        if challenge.get("version") != wire.VERSION:
            raise TeacherRefused(f"the teacher speaks protocol version {challenge.get('version')}, not {wire.VERSION}")
        theirs = str(challenge.get("nonce"))
        if not session.same(session.proof(self._secret, "server", name, theirs, nonce), challenge.get("proof")):
            session.put(store, session.key(name, "answer"), {"proof": None})  # so that the server does not wait
            raise TeacherRefused("the teacher has another secret (GRPO_KD_TEACHER_SECRET)")
        mine = session.proof(self._secret, "client", name, theirs, nonce)
        session.put(store, session.key(name, "answer"), {"proof": mine, **self._expected})
        verdict = session.take(store, session.key(name, "verdict"))
        if "error" in verdict:
            raise (RuntimeError if verdict.get("retry") else TeacherRefused)(verdict["error"])
        self._info = _info(verdict["info"])
        group = session.form_group(store, name, session.CLIENT, session.local_address(host, port))
        return Channel(group, session.SERVER)


def resolve(address: str) -> tuple[str, int]:
    """(host, port) of `host:port`, or of the file at this path."""
    text = address
    host, colon, port = text.rpartition(":")
    if not (colon and port.isdigit()):
        text = Path(address).read_text(encoding="utf-8").strip()
        host, colon, port = text.rpartition(":")
    if not (host and port.isdigit()):
        raise ValueError(f"teacher.address = {address!r}: neither host:port nor a file that holds it")
    return socket.gethostbyname(host), int(port)


def _info(value: dict[str, Any]) -> TeacherInfo:
    known = {field.name: value[field.name] for field in fields(TeacherInfo)}
    return TeacherInfo(**{**known, "eos_ids": tuple(known["eos_ids"])})


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
