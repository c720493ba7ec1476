"""A session: the handshake in the server's TCPStore, then a two-rank gloo group between the server and one client.

The handshake goes over the store, not over gloo: gloo ends the whole process when a peer sends more bytes than were
asked for, so only peers that have proven the secret come that far. The secret itself is never sent.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from inference.protocol import wire

c10d: Any = torch.distributed
"""torch.distributed, untyped: its stubs leave out stores, gloo's options, and send and recv of a group."""

ANNOUNCED = "grpo_kd/open/"
"""Store keys under which clients leave {session, nonce, version, proof} begin so; the session's name follows."""
CONNECT_S = 15.0
"""Seconds that one side waits for the other's next word in the handshake, and for the group to form."""
PING_S = 20.0
"""Seconds after which an idle client says that it is alive."""
IDLE_S = 150.0
"""Seconds of silence after which the server ends a session."""
SERVER, CLIENT = 0, 1
NAME = re.compile(r"[0-9a-f]{32}")


def key(name: str, part: str) -> str:
    """Store key of a part of a session: challenge, answer, verdict, group."""
    return f"grpo_kd/session/{name}/{part}"


def new_nonce() -> str:
    """128 random bits; also the form of a session's name."""
    return secrets.token_hex(16)


def proof(secret: str, side: str, session: str, server_nonce: str, client_nonce: str) -> str:
    """HMAC-SHA256 that shows knowledge of the secret, for this session and this side only."""
    message = "|".join([side, str(wire.VERSION), session, server_nonce, client_nonce])
    return hmac.new(secret.encode(), message.encode(), hashlib.sha256).hexdigest()


def same(mine: str, theirs: object) -> bool:
    """Constant-time comparison with something that came from the wire."""
    return isinstance(theirs, str) and hmac.compare_digest(mine.encode(), theirs.encode())


def put(store: Any, name: str, value: dict[str, Any]) -> None:
    """Leave JSON in the store."""
    store.set(name, json.dumps(value))


def take(store: Any, name: str) -> dict[str, Any]:
    """Wait for JSON in the store; a RuntimeError after the store's timeout, WireError if it is malformed."""
    return wire.decode_json(store.get(name))


def one_line(error: Exception) -> str:
    """An error's text in one line of reasonable length."""
    return " ".join(str(error).split())[:200]


def local_address(host: str, port: int) -> str:
    """The address of this machine that `host` is reached from. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return probe.getsockname()[0]


def form_group(store: Any, name: str, rank: int, address: str) -> Any:
    """Join the session's gloo group on this machine's `address`; RuntimeError if the peer does not come."""
    options = c10d.ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=CONNECT_S)
    options._devices = [c10d.ProcessGroupGloo.create_device(hostname=address)]
    return c10d.ProcessGroupGloo(c10d.PrefixStore(key(name, "group"), store), rank, 2, options)


class Channel:
    """Messages over a session's group. Any failure of the peer is a RuntimeError."""

    def __init__(self, group: Any, peer: int) -> None:
        self._group, self._peer = group, peer

    def send(self, tensors: Sequence[torch.Tensor], timeout_s: float) -> None:
        """Send a header and its payloads; empty ones are left out on both sides."""
        for tensor in tensors:
            if tensor.numel():
                self._group.send([tensor], self._peer, 0).wait(timedelta(seconds=timeout_s))

    def receive(self, count: int, dtype: torch.dtype, timeout_s: float) -> torch.Tensor:
        """Receive a tensor of `count` elements. Zeros first: a short message leaves the rest as it was."""
        tensor = torch.zeros(count, dtype=dtype)
        if count:
            self._group.recv([tensor], self._peer, 0).wait(timedelta(seconds=timeout_s))
        return tensor

    def receive_header(self, timeout_s: float) -> list[int]:
        """The next header; WireError if it is not one of this protocol's."""
        return wire.check_header(self.receive(wire.HEADER_WORDS, torch.int64, timeout_s))
