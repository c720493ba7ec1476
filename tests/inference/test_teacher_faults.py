"""A thousand sessions, good and hostile, and ranks that die: the server lives, or goes down as a whole."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from inference.attention.packing import Group
from inference.client import TeacherClient
from inference.protocol import session, wire
from inference.protocol.connection import Connector, TeacherRefused, resolve
from inference.protocol.wire import Request
from tests.support.teacher_models import VOCAB, build, save_tokenizer
from tests.support.teacher_servers import SECRET, commands_with, memory_kib, serve, wait_until_gone

pytestmark = pytest.mark.alone

GROUPS = (Group((5, 6, 7), ((8, 9), (10,))),)
SESSIONS = 1000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server on two ranks and its address. The last test here takes it down."""
    folder = tmp_path_factory.mktemp("teacher")
    build("llama", folder / "tiny")
    save_tokenizer(folder / "tiny")
    process = serve(folder / "tiny", folder / "teacher.address", folder / "log", tensor_parallel=2)
    yield process, str(folder / "teacher.address")
    if process.poll() is None:
        process.terminate()
        assert process.wait(60) == 0


def random_bytes(address: str, rng: random.Random) -> None:
    """Not even a TCPStore's client."""
    with socket.create_connection(resolve(address), timeout=20) as peer:
        peer.sendall(rng.randbytes(rng.randint(1, 5000)))


def wrong_secret(address: str, rng: random.Random) -> None:
    """All goes well until the proof."""
    with pytest.raises(TeacherRefused, match="secret"):
        Connector(address, secret="guess", tokenizer_fingerprint=None, timeout_s=60).open(time.monotonic() + 60, "")


STORES = threading.local()


def malformed(address: str, rng: random.Random) -> None:
    """An announcement that is none."""
    if getattr(STORES, "address", None) != address:
        host, port = resolve(address)
        STORES.address, STORES.store = address, session.c10d.TCPStore(host, port, is_master=False)
    junk = rng.choice([b"{", b"[1]", b'{"session": "../../x", "nonce": 1}', b"x" * 100_000, rng.randbytes(100)])
    STORES.store.set(session.ANNOUNCED + rng.choice([session.new_nonce(), "7", "", "x" * 1000, "../x"]), junk)


def with_the_secret(change: Callable[[list[int], list[int], random.Random], None]) -> Callable[..., None]:
    """A peer that got in, and whose message is a changed one. It must be told, and then be left."""

    def attack(address: str, rng: random.Random) -> None:
        connector = Connector(address, secret=SECRET, tokenizer_fingerprint=None, timeout_s=60)
        channel = connector.open(time.monotonic() + 60, "")
        header, payload = (tensor.tolist() for tensor in wire.encode_request(Request("score", GROUPS)))
        change(header, payload, rng)
        channel.send([torch.tensor(header)], 20)
        try:
            wire.request_payload_size(header)
        except wire.WireError:
            pass  # the server refuses the header and does not wait for the payload
        else:
            channel.send([torch.tensor(payload)], 20)
        words = channel.receive_header(20)
        assert words[2] == wire.REFUSED
        assert wire.decode_json(channel.receive(words[4], torch.uint8, 20))["error"]
        with pytest.raises(RuntimeError):
            channel.receive_header(20)

    return attack


def huge_counts(header: list[int], payload: list[int], rng: random.Random) -> None:
    header[rng.randint(3, 6)] = rng.choice([1 << 40, (1 << 63) - 1, -1, -(1 << 63)])


def ids_out_of_range(header: list[int], payload: list[int], rng: random.Random) -> None:
    payload[-rng.randint(1, 6)] = rng.choice([VOCAB, -1, 1 << 62, -(1 << 62)])


def no_temperature(header: list[int], payload: list[int], rng: random.Random) -> None:
    bits = torch.tensor([rng.choice([float("nan"), float("inf"), -1.0, 0.0])], dtype=torch.float64).view(torch.int64)
    header[8] = int(bits)


def leaves_in_the_middle(address: str, rng: random.Random) -> None:
    """A client that got in and is gone: before it asks, in the middle of a question, or before the answer."""
    channel = Connector(address, secret=SECRET, tokenizer_fingerprint=None, timeout_s=60).open(
        time.monotonic() + 60, ""
    )
    header, payload = wire.encode_request(Request("score", GROUPS))
    for part in (header, payload)[: rng.randint(0, 2)]:
        channel.send([part], 20)


def asked(client: TeacherClient, kind: int) -> list[torch.Tensor]:
    """One of the questions of a run."""
    groups = [Group((5, 6, 7 + kind), ((8, 9, kind), (10,), (kind,) * kind), 3 * n) for n in range(1 + kind)]
    if kind % 4 == 0:
        return [client.score(groups, temperature=1 + kind).result(60)]
    if kind % 4 == 1:
        return [client.hidden(groups).result(60)]
    if kind % 4 == 2:
        return client.topk(groups, k=3).result(60)
    answers = client.generate([(5, 6, kind), (7,)], max_new_tokens=6, temperature=1.0, seed=kind).result(60)
    return [torch.tensor(answer) for answer in answers]


KINDS = 12
RIGHT: dict[int, list[torch.Tensor]] = {}
"""What a client alone was answered, by kind."""


def valid(address: str, rng: random.Random) -> None:
    """A run's client, that asks a few questions; each answer is what it was before all this."""
    with TeacherClient(address, secret=SECRET, tokenizer_fingerprint=None, timeout_s=60) as client:
        for kind in rng.sample(range(KINDS), rng.randint(1, 3)):
            for got, right in zip(asked(client, kind), RIGHT[kind], strict=True):
                torch.testing.assert_close(got, right, rtol=0, atol=1e-5)


SORTS = (
    *[valid] * 8,
    *[random_bytes] * 2,
    *[malformed] * 2,
    wrong_secret,
    leaves_in_the_middle,
    with_the_secret(huge_counts),
    with_the_secret(ids_out_of_range),
    with_the_secret(no_temperature),
)


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def settled(count: Callable[[int], int], pid: int, most: int, seconds: float = 40) -> int:
    """The count once it is at most that much; as it is after so long."""
    deadline = time.monotonic() + seconds
    while count(pid) > most and time.monotonic() < deadline:
        time.sleep(0.2)
    return count(pid)


def test_a_thousand_sessions_good_and_hostile(server: tuple[subprocess.Popen[bytes], str]) -> None:
    """In random order, eight at a time: no valid answer is another, and nothing grows."""
    process, address = server
    pid, seen = process.pid, Counter[str]()
    with TeacherClient(address, secret=SECRET, tokenizer_fingerprint=None, timeout_s=60) as client:
        RIGHT.update({kind: asked(client, kind) for kind in range(KINDS)})
        alone = threads(pid), descriptors(pid)

        def session_of(number: int) -> None:
            rng = random.Random(number)
            sort = rng.choice(SORTS)
            sort(address, rng)
            seen[sort.__name__] += 1

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(session_of, range(200)))  # what is allocated once, is
            memory, began = memory_kib(pid), time.monotonic()
            seen.clear()
            list(pool.map(session_of, range(200, 200 + SESSIONS)))
        seconds, grown = time.monotonic() - began, memory_kib(pid) - memory
        left = settled(threads, pid, alone[0] + 4), settled(descriptors, pid, alone[1] + 40)
        for kind in range(KINDS):
            assert all(map(torch.allclose, asked(client, kind), RIGHT[kind]))
    assert process.poll() is None
    print(f"{dict(seen)} in {seconds:.0f} s: memory {memory} + {grown} KiB; threads, descriptors {alone} -> {left}")
    assert sum(seen.values()) == SESSIONS
    assert seen["valid"] > 300
    assert grown < 30_000
    assert left[0] <= alone[0] + 4
    assert left[1] <= alone[1] + 40, "of which the store keeps some open for the next handshakes"


def test_a_rank_that_is_killed_takes_the_server_down(server: tuple[subprocess.Popen[bytes], str]) -> None:
    process, address = server
    (rank,) = [pid for pid in commands_with(address) if pid != process.pid]
    os.kill(rank, signal.SIGKILL)
    assert process.wait(60) == 1
    wait_until_gone(address)
    assert "a tensor-parallel rank ended with -9" in Path(address).with_name("log").read_text()
