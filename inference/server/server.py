"""The server: a TCPStore that clients meet in, and one thread for each session. Only rank 0 has one.

A session thread talks to its client and to the engine's queue, nothing else; whatever goes wrong in it ends that
session alone.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import socket
import threading
import time
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any

import torch

from configs.schema import TeacherConfig
from inference.protocol import session, wire
from inference.protocol.arriving import Limits, decode_request
from inference.protocol.replies import TeacherInfo
from inference.protocol.session import Channel
from inference.server.engine import Engine
from inference.server.guard import Descriptors

logger = logging.getLogger("teacher")

POLL_S = 0.02
MAX_SESSIONS = 1024
"""Clients served at a time, one for each rank of every run that asks; each is a thread that waits."""
HANDSHAKES = 64
"""Handshakes at a time with peers whose announcement shows the secret; more wait. As many with others, which are left
unanswered where there are more: they try again."""
LOOK_S = 0.5
"""Seconds for the announcements that were found, before new ones are looked for."""
REFUSAL_S = 5.0
REPLY_S = 300.0
"""Seconds that a client may take to receive a reply."""


class Server:
    """Accepts sessions until `close`."""

    def __init__(
        self,
        config: TeacherConfig,
        info: TeacherInfo,
        secret: str,
        engine: Engine,
        stopping: threading.Event | None = None,
    ) -> None:
        """`stopping`: nobody is accepted from when it is set; the server sets it itself where it cannot go on."""
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
        self._numbers = itertools.count(1)
        """Of sessions, each given once."""
        self._watching = self._store.clone()
        """The accepting thread's connection: a peer's odd write may cost it, the store's own must stay."""
        self._closing = stopping or threading.Event()
        self._descriptors = Descriptors()
        self.failed = False
        """Whether it left because it could not go on."""
        self._lock = threading.Lock()
        self._sessions = 0
        self._busy = 0
        self._ended: list[tuple[float, str]] = []
        """(when, session): whose keys are deleted then. Not at once: a refused client still has to read why."""
        self._stores: list[Any] = []
        """Connections to the store that no handshake uses just now."""
        self._handshakes = {shown: threading.BoundedSemaphore(HANDSHAKES) for shown in (True, False)}
        self._limits = Limits(info.vocab_size, info.max_positions, config.max_cache_tokens)

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
        """Begin the sessions that are announced in the store. Any peer can write there."""
        while not self._closing.is_set():
            time.sleep(POLL_S)
            try:
                names = [name for name in self._watching.list_keys() if name.startswith(session.ANNOUNCED)]
                found = zip(names, self._watching.multi_get(names), strict=True) if names else ()
                hellos = [(name, *self._read(announced)) for name, announced in found]
                until = time.monotonic() + LOOK_S
                for name, hello, shown in sorted(hellos, key=lambda one: not one[2]):  # a flood of others has to wait
                    if self._begin(hello, shown):
                        self._watching.delete_key(name)
                    if not shown and time.monotonic() > until:
                        break
                self._forget()
            except RuntimeError as error:
                logger.warning("accepting: %s", _line(error))
                self._watching = self._store.clone()
            if (problem := self._descriptors.problem()) is not None:
                logger.error("%s; leaving", problem)
                self.failed = True
                self._closing.set()

    def _read(self, announced: bytes) -> tuple[dict[str, Any], bool]:
        """What a client announced, {} where it is malformed, and whether it shows the secret."""
        try:
            hello = wire.decode_json(announced)
            name, nonce = str(hello.get("session")), str(hello.get("nonce"))
            if not session.NAME.fullmatch(name):
                raise wire.WireError("malformed session name")
            return hello, session.same(session.proof(self._secret, "hello", name, "", nonce), hello.get("proof"))
        except wire.WireError as error:
            logger.info("an announcement is refused: %s", _line(error))
            return {}, False

    def _begin(self, hello: dict[str, Any], shown: bool) -> bool:
        """Start the session of a client; False where it has to wait. Who does not show the secret does not: it is
        forgotten where many like it are being asked for it."""
        free = bool(hello) and self._handshakes[shown].acquire(blocking=False)
        if free:
            args = (next(self._numbers), hello["session"], hello, shown)
            threading.Thread(target=self._session, args=args, daemon=True).start()
        return free or not shown

    def _session(self, number: int, name: str, hello: dict[str, Any], shown: bool) -> None:
        """One client, from its announcement to its end."""
        opened = False
        try:
            try:
                store = self._borrow_store()
                try:
                    self._handshake(store, name, hello)
                    opened = True
                    group = session.form_group(store, name, session.SERVER, self._config.interface)
                except wire.WireError:
                    self._stores.append(store)
                    raise
                self._stores.append(store)  # after a RuntimeError it may be in the middle of a wait: not used again
            finally:
                self._handshakes[shown].release()
            logger.info("session %d opened", number)
            self._serve(number, Channel(group, session.CLIENT))
        except (RuntimeError, ValueError) as error:
            logger.info("session %d ended: %s", number, _line(error))
        finally:
            with self._lock:
                self._sessions -= opened
                self._ended.append((time.monotonic() + session.CONNECT_S, name))
            if opened:
                with contextlib.suppress(RuntimeError, ValueError):  # a stopping server frees everything anyway
                    self._engine.submit(wire.Request("release", owner=number))

    def _borrow_store(self) -> Any:
        """A connection to the store of one's own: a wait holds it until the answer comes."""
        try:
            return self._stores.pop()
        except IndexError:
            store = self._store.clone()
            store.set_timeout(timedelta(seconds=session.CONNECT_S))
            return store

    def _handshake(self, store: Any, name: str, hello: dict[str, Any]) -> None:
        """Prove the secret to each other and compare the tokenizers. A refusal is written, then raised."""
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
        expected, own = answer.get("tokenizer_fingerprint"), self._info.tokenizer_fingerprint
        if expected is not None and expected != own:
            refusal = (
                f"tokenizer fingerprint: the client has {expected!s:.64}, the teacher {self._info.model} has {own}"
            )
            session.put(store, verdict, {"error": refusal})
            raise wire.WireError(f"refused: {refusal}")
        with self._lock:
            full = self._sessions >= MAX_SESSIONS or self._closing.is_set()
            if not full:
                self._sessions += 1
        if full:
            session.put(store, verdict, {"error": f"none of {MAX_SESSIONS} sessions is free", "retry": True})
            raise wire.WireError("refused: no session is free")
        session.put(store, verdict, {"info": asdict(self._info)})

    def _serve(self, number: int, channel: Channel) -> None:
        """Requests, one after the other, until the client leaves or breaks a rule."""
        while not self._closing.is_set():
            words = channel.receive(wire.HEADER_WORDS, torch.int64, session.IDLE_S)
            with self._lock:
                self._busy += 1
            try:
                channel.send(self._answer(number, channel, wire.check_header(words)), REPLY_S)
            except wire.StateLost as error:
                channel.send(wire.encode_error(str(error), wire.STATE_LOST), REPLY_S)
            except wire.WireError as error:
                # A peer that still waits to send its payload does not listen; ours check the limits beforehand.
                channel.send(wire.encode_error(str(error)), REFUSAL_S)
                raise
            finally:
                with self._lock:
                    self._busy -= 1

    def _answer(self, number: int, channel: Channel, words: list[int]) -> list[torch.Tensor]:
        """Read the rest of a request and wait for the engine's answer."""
        payload = channel.receive(wire.request_payload_size(words), torch.int64, session.CONNECT_S * 4)
        request = decode_request(words, payload, self._limits)
        if request.kind == "ping":
            return wire.encode_reply([])
        return wire.encode_reply(self._engine.submit(replace(request, owner=number)).result())

    def _forget(self) -> None:
        """Delete what sessions that ended a while ago left in the store."""
        with self._lock:
            due = [name for when, name in self._ended if time.monotonic() > when]
            self._ended = [(when, name) for when, name in self._ended if name not in due]
        prefixes = tuple(session.key(name, "") for name in due)
        for left in self._watching.list_keys() if due else ():
            if left.startswith(prefixes):
                self._watching.delete_key(left)


def _line(error: Exception) -> str:
    """An error in one line."""
    return "the client is gone" if "Connection closed by peer" in str(error) else session.one_line(error)
