"""Hostile peers, a thousand of them, and ranks that die: the server lives, or goes down as a whole."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from inference import session, wire
from inference.client import TeacherClient
from inference.connection import Connector, TeacherRefused, resolve
from inference.packing import Group
from inference.wire import Request
from tests.teacher_models import VOCAB, build, save_tokenizer
from tests.teacher_servers import SECRET, commands_with, memory_kib, serve, wait_until_gone

GROUPS = (Group((5, 6, 7), ((8, 9), (10,))),)
NOTHING = dict.fromkeys(("tokenizer_fingerprint", "vocab_size", "dtype", "temperature"))
SESSIONS = 1000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("teacher") / "tiny"
    build("llama", directory)
    save_tokenizer(directory)
    return directory


@pytest.fixture
def server(model: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server on two ranks and its address."""
    process = serve(model, tmp_path / "teacher.address", tmp_path / "log", tensor_parallel=2)
    yield process, str(tmp_path / "teacher.address")
    if process.poll() is None:
        process.terminate()
        assert process.wait(20) == 0


def random_bytes(address: str, rng: random.Random) -> None:
    """Not even a TCPStore's client."""
    with socket.create_connection(resolve(address), timeout=20) as peer:
        peer.sendall(rng.randbytes(rng.randint(1, 5000)))


def wrong_secret(address: str, rng: random.Random) -> None:
    """All goes well until the proof."""
    with pytest.raises(TeacherRefused, match="secret"):
        Connector(address, prefer=0, secret="guess", timeout_s=60, expected=NOTHING).open(time.monotonic() + 60, "")


STORES = threading.local()


def malformed(address: str, rng: random.Random) -> None:
    """An announcement that is none."""
    if getattr(STORES, "address", None) != address:
        host, port = resolve(address)
        STORES.address, STORES.store = address, session.c10d.TCPStore(host, port, is_master=False)
    junk = rng.choice([b"{", b"[1]", b'{"session": "../../x", "nonce": 1}', b"x" * 100_000, rng.randbytes(100)])
    STORES.store.set(session.announcement(STORES.store.add(session.COUNTER, 1)), junk)


def with_the_secret(change: Callable[[list[int], list[int], random.Random], None]) -> Callable[..., None]:
    """A peer that got in, and whose message is a changed one. It must be told, and then be left."""

    def attack(address: str, rng: random.Random) -> None:
        connector = Connector(address, prefer=0, secret=SECRET, timeout_s=60, expected=NOTHING)
        channel = connector.open(time.monotonic() + 60, "")
        header, payload = (tensor.tolist() for tensor in wire.encode_request(Request("score", GROUPS)))
        change(header, payload, rng)
        channel.send([torch.tensor(header)], 20)
        try:
            wire.request_payload_size(header, wire.Limits(1 << 22, 1 << 16, VOCAB, 128))
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
    header[7] = int(bits)


ATTACKS = (
    *[random_bytes] * 3,
    *[malformed] * 3,
    wrong_secret,
    with_the_secret(huge_counts),
    with_the_secret(ids_out_of_range),
    with_the_secret(no_temperature),
)


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def test_a_thousand_hostile_sessions(server: tuple[subprocess.Popen[bytes], str]) -> None:
    process, address = server
    with TeacherClient(address, secret=SECRET, tokenizer_fingerprint=None, timeout_s=30) as client:
        before = client.score(GROUPS).result(30).logprobs_S

        def attack(number: int) -> None:
            ATTACKS[number % len(ATTACKS)](address, random.Random(number))

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(attack, range(100)))  # what is allocated once, is
            rss, running = memory_kib(process.pid), threads(process.pid)
            list(pool.map(attack, range(100, 100 + SESSIONS)))
        assert torch.equal(client.score(GROUPS).result(30).logprobs_S, before)
    assert process.poll() is None
    grown = memory_kib(process.pid) - rss
    print(f"{SESSIONS} hostile sessions: memory grew by {grown} KiB")
    assert grown < 30_000
    deadline = time.monotonic() + 20
    while threads(process.pid) > running + 4:
        assert time.monotonic() < deadline, f"{threads(process.pid)} threads, {running} before"
        time.sleep(0.2)


def test_a_rank_that_is_killed_takes_the_server_down(server: tuple[subprocess.Popen[bytes], str]) -> None:
    process, address = server
    (rank,) = [pid for pid in commands_with(address) if pid != process.pid]
    os.kill(rank, signal.SIGKILL)
    assert process.wait(20) == 1
    wait_until_gone(address)
    assert "a tensor-parallel rank ended with -9" in Path(address).with_name("log").read_text()
