"""The server: a TCPStore that clients meet in, and one thread for each session. Only rank 0 has one.

A session thread talks to its client and to the engine's queue, nothing else; whatever goes wrong in it ends that
session alone.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from configs.schema import TeacherConfig
from inference import session, wire
from inference.engine import Engine
from inference.fingerprint import tokenizer_fingerprint, vocabulary_fingerprint
from inference.output_layer import describe_output_layer
from inference.session import Channel
from inference.teacher import Teacher

logger = logging.getLogger("teacher")

POLL_S = 0.02
HANDSHAKES = 32
"""Handshakes at a time; more wait."""
REFUSAL_S = 5.0
REPLY_S = 300.0
"""Seconds that a client may take to receive a reply."""


@dataclass(frozen=True)
class ServerInfo:
    """What clients may know of the teacher; sent as JSON."""

    model: str
    """The model directory's name."""
    model_dir: str
    vocab_size: int
    hidden_size: int
    dtype: str
    tensor_parallel: int
    max_positions: int
    max_request_tokens: int
    max_request_rows: int
    eos_ids: list[int]
    tokenizer_fingerprint: str
    vocabulary_fingerprint: str
    output_layer: dict[str, Any]


class Server:
    """Accepts sessions until `close`."""

    def __init__(self, config: TeacherConfig, info: ServerInfo, secret: str, engine: Engine) -> None:
        self._config, self._info, self._secret, self._engine = config, info, secret, engine
        listener = socket.create_server((config.interface, config.port), backlog=128)
        self.port: int = listener.getsockname()[1]
        # The store binds to every interface unless it is given a socket that is already bound to one.
        self._store = session.c10d.TCPStore(
            config.interface,
            self.port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
            timeout=timedelta(seconds=session.CONNECT_S),
        )
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._sessions = 0
        self._busy = 0
        self._ended: list[tuple[float, str]] = []
        """(when, session): whose keys are deleted then. Not at once: a refused client still has to read why."""
        self._stores: list[Any] = []
        """Connections to the store that no handshake uses just now."""
        self._handshakes = threading.BoundedSemaphore(HANDSHAKES)
        self._limits = wire.Limits(
            tokens=config.max_request_tokens,
            rows=config.max_request_rows,
            vocab_size=info.vocab_size,
            max_positions=info.max_positions,
            cache_tokens=config.max_cache_tokens,
        )

    @property
    def address(self) -> str:
        """host:port."""
        return f"{self._config.interface}:{self.port}"

    def sessions(self) -> int:
        """Sessions being served."""
        return self._sessions

    def start(self) -> None:
        """Accept in a thread."""
        threading.Thread(target=self._accept, name="accept", daemon=True).start()

    def close(self, timeout_s: float = 10.0) -> None:
        """Accept nobody any more and wait for the replies that are on their way."""
        self._closing.set()
        deadline = time.monotonic() + timeout_s
        while self._busy and time.monotonic() < deadline:
            time.sleep(0.02)

    def _accept(self) -> None:
        """Watch the counter; each number below it is, or was, a client."""
        following = 1
        waiting: dict[int, float] = {}
        while not self._closing.is_set():
            time.sleep(POLL_S)
            try:
                announced = self._store.add(session.COUNTER, 0)
                # A peer may have pushed the counter far ahead; only the newest are looked at.
                for number in range(max(following, announced - 1000), announced + 1):
                    waiting[number] = time.monotonic() + session.CONNECT_S
                following = max(following, announced + 1)
                for number, deadline in list(waiting.items()):
                    if self._store.check([session.announcement(number)]):
                        del waiting[number]
                        self._handshakes.acquire()
                        threading.Thread(target=self._session, args=(number,), daemon=True).start()
                    elif time.monotonic() > deadline:
                        del waiting[number]
                self._forget()
            except RuntimeError as error:
                logger.warning("accepting: %s", _line(error))

    def _session(self, number: int) -> None:
        """One client, from its announcement to its end."""
        name = ""
        opened = False
        try:
            try:
                store = self._borrow_store()
                try:
                    name, limits = self._enter(store, number)
                    opened = True
                    group = session.form_group(store, name, session.SERVER, self._config.interface)
                except wire.WireError:
                    self._stores.append(store)
                    raise
                self._stores.append(store)  # after a RuntimeError it may be in the middle of a wait: not used again
            finally:
                self._handshakes.release()
            logger.info("session %d opened", number)
            self._serve(number, Channel(group, session.CLIENT), limits)
        except (RuntimeError, ValueError) as error:
            logger.info("session %d ended: %s", number, _line(error))
        finally:
            if opened:
                with self._lock:
                    self._sessions -= 1
                with contextlib.suppress(RuntimeError):  # a stopping server frees everything anyway
                    self._engine.submit(wire.Request("release", owner=number))
            if name:
                self._leave(name)

    def _borrow_store(self) -> Any:
        """A connection to the store of one's own: a wait holds it until the answer comes."""
        try:
            return self._stores.pop()
        except IndexError:
            store = self._store.clone()
            store.set_timeout(timedelta(seconds=session.CONNECT_S))
            return store

    def _enter(self, store: Any, number: int) -> tuple[str, wire.Limits]:
        """Read an announcement and shake hands; the session's name and limits."""
        try:
            hello = session.take(store, session.announcement(number))
        finally:
            store.delete_key(session.announcement(number))
        name = str(hello.get("session"))
        if not session.NAME.fullmatch(name):
            raise wire.WireError("malformed session name")
        try:
            return name, self._handshake(store, name, hello)
        except (RuntimeError, ValueError):
            self._leave(name)
            raise

    def _leave(self, name: str) -> None:
        """Have a session's keys deleted later."""
        with self._lock:
            self._ended.append((time.monotonic() + session.CONNECT_S, name))

    def _handshake(self, store: Any, name: str, hello: dict[str, Any]) -> wire.Limits:
        """Prove the secret to each other and compare what must agree. A refusal is written, then raised."""
        nonce, theirs = session.new_nonce(), str(hello.get("nonce"))
        mine = session.proof(self._secret, "server", name, nonce, theirs)
        challenge = {"version": wire.VERSION, "nonce": nonce, "proof": mine}
        session.put(store, session.key(name, "challenge"), challenge)
        if hello.get("version") != wire.VERSION:
            raise wire.WireError(f"the client speaks protocol version {hello.get('version')!r}, not {wire.VERSION}")
        answer = session.take(store, session.key(name, "answer"))
        verdict = session.key(name, "verdict")
        if not session.same(session.proof(self._secret, "client", name, nonce, theirs), answer.get("proof")):
            session.put(store, verdict, {"error": "wrong secret (GRPO_KD_TEACHER_SECRET)"})
            raise wire.WireError("wrong secret")
        refusal = self._refusal(answer)
        if refusal is not None:
            session.put(store, verdict, {"error": refusal})
            raise wire.WireError(f"refused: {refusal}")
        with self._lock:
            full = self._sessions >= self._config.max_sessions or self._closing.is_set()
            if not full:
                self._sessions += 1
        if full:
            session.put(store, verdict, {"error": "no session is free (teacher.max_sessions)", "retry": True})
            raise wire.WireError("refused: no session is free")
        session.put(store, verdict, {"info": vars(self._info)})
        temperature = answer.get("temperature")
        return self._limits if temperature is None else replace(self._limits, temperature=float(temperature))

    def _refusal(self, answer: dict[str, Any]) -> str | None:
        """What of the client's expectations this teacher does not meet."""
        for field, what in (
            ("tokenizer_fingerprint", "tokenizer fingerprint"),
            ("vocab_size", "vocabulary size"),
            ("dtype", "dtype"),
        ):
            expected, is_ = answer.get(field), getattr(self._info, field)
            if expected is not None and expected != is_:
                return f"{what}: the client has {expected!s:.64}, the teacher {self._info.model} has {is_}"
        temperature = answer.get("temperature")
        if temperature is not None and not (isinstance(temperature, int | float) and 1e-3 <= temperature <= 1e3):
            return f"temperature {temperature!s:.64} is not within [0.001, 1000]"
        return None

    def _serve(self, number: int, channel: Channel, limits: wire.Limits) -> None:
        """Requests, one after the other, until the client leaves or breaks a rule."""
        while not self._closing.is_set():
            words = channel.receive(wire.HEADER_WORDS, torch.int64, session.IDLE_S)
            with self._lock:
                self._busy += 1
            try:
                channel.send(self._answer(number, channel, wire.check_header(words), limits), REPLY_S)
            except wire.StateLost as error:
                channel.send(wire.encode_reply([], error=str(error), status=wire.STATE_LOST), REPLY_S)
            except wire.WireError as error:
                # A peer that still waits to send its payload does not listen; ours check the limits beforehand.
                channel.send(wire.encode_reply([], error=str(error)), REFUSAL_S)
                raise
            finally:
                with self._lock:
                    self._busy -= 1

    def _answer(self, number: int, channel: Channel, words: list[int], limits: wire.Limits) -> list[torch.Tensor]:
        """Read the rest of a request and wait for the engine's answer."""
        size = wire.request_payload_size(words, limits)
        request = wire.decode_request(words, channel.receive(size, torch.int64, session.CONNECT_S * 4), limits)
        if request.kind == "ping":
            return wire.encode_reply([])
        if request.kind == "info":
            return wire.encode_reply([wire.encode_json(vars(self._info))])
        future: Future[list[torch.Tensor]] = self._engine.submit(replace(request, owner=number))
        return wire.encode_reply(future.result())

    def _forget(self) -> None:
        """Delete what sessions that ended a while ago left in the store."""
        with self._lock:
            due = [name for when, name in self._ended if time.monotonic() > when]
            self._ended = [(when, name) for when, name in self._ended if name not in due]
        prefixes = tuple(session.key(name, "") for name in due)
        for left in self._store.list_keys() if due else ():
            if left.startswith(prefixes):
                self._store.delete_key(left)


def _line(error: Exception) -> str:
    """An error in one line of reasonable length."""
    if "Connection closed by peer" in str(error):
        return "the client is gone"
    return " ".join(str(error).split())[:300]


def describe(config: TeacherConfig, teacher: Teacher) -> ServerInfo:
    """What this server says of itself."""
    path = Path(config.path)
    try:
        tokenizer, vocabulary = tokenizer_fingerprint(path), vocabulary_fingerprint(path)
    except Exception as error:  # whatever transformers raises for a directory without a tokenizer
        logger.warning("no tokenizer fingerprint, so clients that have one will be refused: %s", _line(error))
        tokenizer = vocabulary = "none"
    a = teacher.architecture
    return ServerInfo(
        model=path.resolve().name,
        model_dir=str(path.resolve()),
        vocab_size=a.vocab_size,
        hidden_size=a.hidden_size,
        dtype=config.dtype,
        tensor_parallel=teacher.size,
        max_positions=a.max_positions,
        max_request_tokens=config.max_request_tokens,
        max_request_rows=config.max_request_rows,
        eos_ids=list(a.eos_ids),
        tokenizer_fingerprint=tokenizer,
        vocabulary_fingerprint=vocabulary,
        output_layer=describe_output_layer(path),
    )
