"""Finding a teacher: one address or several replicas, the handshake, and the next replica when one is lost."""

from __future__ import annotations

import logging
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path

from inference.protocol import session, wire
from inference.protocol.replies import TeacherInfo
from inference.protocol.session import Channel

logger = logging.getLogger(__name__)

RETRY_S = 0.3
CLOSED = "the client was closed"


class TeacherLost(RuntimeError):
    """No teacher could be reached for `timeout_s` seconds."""


class TeacherRefused(ValueError):
    """The teacher is there but will not serve this client, or this request: the message says why."""


class Connector:
    """Opens sessions. It stays with one replica until that is lost, and then takes the next in the list."""

    def __init__(
        self, addresses: str, *, secret: str, tokenizer_fingerprint: str | None, timeout_s: float, prefer: int = 0
    ) -> None:
        """As `TeacherClient`."""
        self.addresses = [address.strip() for address in addresses.split(",") if address.strip()]
        if not self.addresses:
            raise ValueError(f"teacher.address = {addresses!r}: names no server")
        for host, _, port in (address.rpartition(":") for address in self.addresses):
            if ":" in host and "/" not in host and port.isdigit():
                raise ValueError(f"teacher.address = {addresses!r}: give IPv4 addresses or names; IPv6 is not spoken")
        self.closed = threading.Event()
        self.info: TeacherInfo | None = None
        """What the server said in the last handshake."""
        self._current = prefer % len(self.addresses)
        self._secret, self._fingerprint, self._timeout_s = secret, tokenizer_fingerprint, timeout_s

    @property
    def address(self) -> str:
        """The replica that is asked now."""
        return self.addresses[self._current]

    def open(self, deadline: float, reason: str) -> Channel:
        """Connect and shake hands, again and again until the deadline; TeacherRefused at once.

        `reason` says why there is no connection yet; it is in the TeacherLost that is raised at the deadline.
        """
        failures = 0
        lost = self.address if self.info is not None else None
        while True:
            if self.closed.is_set():
                raise TeacherLost(CLOSED)
            try:
                channel = self._connect(self.address)
                if lost is not None:
                    logger.warning("teacher at %s was lost (%s); asking %s", lost, reason, self.address)
                return channel
            except TeacherRefused:
                raise
            except (RuntimeError, OSError, ValueError) as error:
                reason = session.one_line(error)
                failures += 1
            if time.monotonic() + RETRY_S > deadline:
                tried = " or ".join(self.addresses)
                raise TeacherLost(f"no teacher at {tried} for {self._timeout_s:.0f} s: {reason}")
            lost = lost or self.address
            self._current = (self._current + 1) % len(self.addresses)
            if failures % len(self.addresses) == 0:
                time.sleep(RETRY_S)

    def _connect(self, address: str) -> Channel:
        host, port = resolve(address)
        # Knock first: TCPStore would print warnings for as long as nobody listens.
        socket.create_connection((host, port), timeout=session.CONNECT_S).close()
        store = session.c10d.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=session.CONNECT_S))
        name, nonce = session.new_nonce(), session.new_nonce()
        shown = session.proof(self._secret, "hello", name, "", nonce)  # before the server asks: it is let in first
        hello = {"session": name, "nonce": nonce, "version": wire.VERSION, "proof": shown}
        session.put(store, session.ANNOUNCED + name, hello)
        challenge = session.take(store, session.key(name, "challenge"))
        if challenge.get("version") != wire.VERSION:
            raise TeacherRefused(f"the teacher speaks protocol version {challenge.get('version')}, not {wire.VERSION}")
        theirs = str(challenge.get("nonce"))
        if not session.same(session.proof(self._secret, "server", name, theirs, nonce), challenge.get("proof")):
            session.put(store, session.key(name, "answer"), {"proof": None})  # so that the server does not wait
            raise TeacherRefused("the teacher has another secret (GRPO_KD_TEACHER_SECRET)")
        mine = session.proof(self._secret, "client", name, theirs, nonce)
        answer = {"proof": mine, "tokenizer_fingerprint": self._fingerprint}
        session.put(store, session.key(name, "answer"), answer)
        verdict = session.take(store, session.key(name, "verdict"))
        if "error" in verdict:
            raise (RuntimeError if verdict.get("retry") else TeacherRefused)(verdict["error"])
        info = TeacherInfo.from_json(verdict["info"])
        if self.info is not None and not info.same_teacher(self.info):
            raise TeacherRefused(f"{address} serves another teacher ({info.model}) than before ({self.info.model})")
        self.info = info
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
