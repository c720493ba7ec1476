"""A server in use: signals end it, and peers that write or connect what they like do not."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from inference.attention.packing import Group
from inference.client import TeacherClient, TeacherLost
from inference.protocol import session, wire
from inference.protocol.connection import resolve
from inference.server.ranks import Ranks
from tests.support.runs import free_port
from tests.support.teacher_models import build, save_tokenizer
from tests.support.teacher_servers import SECRET, SERVER, Started, serve, serve_forked, wait_ready

GROUPS = (Group((5, 6, 7), ((8, 9), (10,)), 0),)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    build("llama", folder)
    save_tokenizer(folder)
    return folder


@contextlib.contextmanager
def server(
    model: Path, folder: Path, tensor_parallel: int = 1, start: Callable[..., Started] = serve_forked
) -> Iterator[tuple[Started, str]]:
    process = start(model, folder / "address", folder / "log", tensor_parallel=tensor_parallel)
    try:
        yield process, (folder / "address").read_text().strip()
    finally:
        process.kill()
        process.wait()


def ask_for_ever(address: str, asked: list[int], end: threading.Event) -> None:
    """Answers one after the other, as a run does."""
    with (
        contextlib.suppress(TeacherLost),
        TeacherClient(address, secret=SECRET, tokenizer_fingerprint=None, timeout_s=2) as client,
    ):
        while not end.is_set():
            client.score([Group((5, 6, 7), ((8, 9), (10,)), 2 * i) for i in range(50)]).result(60)
            asked.append(1)


@pytest.mark.parametrize(
    ("number", "ranks"), [(signal.SIGTERM, 2), (signal.SIGHUP, 1), (signal.SIGINT, 2), (signal.SIGUSR1, 1)]
)
def test_a_signal_ends_a_server_in_use(number: signal.Signals, ranks: int, model: Path, tmp_path: Path) -> None:
    end = threading.Event()
    with server(model, tmp_path, tensor_parallel=ranks) as (process, address):
        asked: list[int] = []
        clients = [threading.Thread(target=ask_for_ever, args=(address, asked, end)) for _ in range(6)]
        for client in clients:
            client.start()
        while len(asked) < 8:
            time.sleep(0.02)
        process.send_signal(number)
        began = time.monotonic()
        assert process.wait(120) == 0
        print(f"{number.name}: gone after {time.monotonic() - began:.1f} s")
        assert not (tmp_path / "address").exists()
        end.set()
        for client in clients:
            client.join(60)
    assert "drained, bye" in (tmp_path / "log").read_text()


def test_nohup_keeps_it_from_hanging_up(model: Path, tmp_path: Path) -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with server(model, tmp_path, start=serve) as (process, _):
            process.send_signal(signal.SIGHUP)
            time.sleep(1.5)
            assert process.poll() is None
    finally:
        signal.signal(signal.SIGHUP, former)


def scores(address: str, timeout_s: float = 40) -> torch.Tensor:
    """What a new client gets."""
    with TeacherClient(address, secret=SECRET, tokenizer_fingerprint=None, timeout_s=timeout_s) as client:
        return client.score(GROUPS).result(30)


COUNTS = ["abc", "", "0", "-1", "-9223372036854775808", str(2**63 - 1), "1e9", "99999999999999999999", "7" * 5000]


def test_odd_writes_to_the_store_do_not_end_accepting(model: Path, tmp_path: Path) -> None:
    with server(model, tmp_path) as (process, address):
        right = scores(address)
        host, port = resolve(address)
        for count in COUNTS:
            store = session.c10d.TCPStore(host, port, is_master=False)
            store.set("grpo_kd/sessions", count)
            store.set(session.ANNOUNCED, count)
            store.set(session.ANNOUNCED + count[:20], count)
            assert torch.equal(scores(address), right), count
        store.delete_key("grpo_kd/sessions")
        assert torch.equal(scores(address), right)
        size = (tmp_path / "log").stat().st_size
        for _ in range(400):  # at most 30 lines of a kind in a minute
            store.set(session.ANNOUNCED + session.new_nonce(), "abc")
            time.sleep(0.005)
        assert (tmp_path / "log").stat().st_size - size < 10_000
        assert torch.equal(scores(address), right)
        assert process.poll() is None


def test_a_flood_of_announcements_keeps_nobody_out(model: Path, tmp_path: Path) -> None:
    """Well-formed ones, of peers that then say nothing: without the secret they get a share of the handshakes only, and
    whoever knows it is let in within his patience."""
    with server(model, tmp_path) as (process, address):
        right = scores(address)
        host, port = resolve(address)
        end = threading.Event()

        def flood() -> None:
            store = session.c10d.TCPStore(host, port, is_master=False)
            while not end.is_set():
                hello = {"session": session.new_nonce(), "nonce": session.new_nonce(), "proof": "0" * 64}
                hello["version"] = wire.VERSION
                session.put(store, session.ANNOUNCED + session.new_nonce(), hello)
                time.sleep(0.005)

        flooder = threading.Thread(target=flood)
        flooder.start()
        time.sleep(1)
        began = time.monotonic()
        for _ in range(3):
            assert torch.equal(scores(address), right)
        print(f"three clients in {time.monotonic() - began:.1f} s during the flood")
        end.set()
        flooder.join()
        lines = (tmp_path / "log").read_text().splitlines()
        assert len(lines) < 200
        assert process.poll() is None


def test_stray_connections_end_it_in_order(model: Path, tmp_path: Path) -> None:
    """A port scanner's connections to gloo's listener stay open: at the limit the server says so and leaves."""
    script = f"ulimit -n 256; exec {sys.executable} {SERVER} --path {model} --address_file {tmp_path}/address"
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", script], env=os.environ | {"GRPO_KD_TEACHER_SECRET": SECRET}, stderr=log
        )
    strays: list[socket.socket] = []
    try:
        wait_ready(process, tmp_path / "address", tmp_path / "log")
        address = (tmp_path / "address").read_text().strip()
        client = TeacherClient(address, secret=SECRET, tokenizer_fingerprint=None, timeout_s=1)
        ports = listening(process.pid)
        assert len(ports) >= 2, "the store's and gloo's"
        for number in range(400):
            with contextlib.suppress(OSError):
                strays.append(socket.create_connection(("127.0.0.1", ports[number % len(ports)]), timeout=1))
            if process.poll() is not None:
                break
            time.sleep(0.02)
        assert process.wait(120) == 1
        client.close()
    finally:
        process.kill()
        process.wait()
        for stray in strays:
            stray.close()
    assert re.search(r"\d+ of 256 descriptors are in use: .*firewall", (tmp_path / "log").read_text())


def listening(process: int) -> list[int]:
    """TCP ports of all interfaces that a process listens on."""
    return [port for _, port in listeners(process)]


def listeners(process: int) -> list[tuple[str, int]]:
    """(hexadecimal address, port) of each listening socket of a process."""
    inodes = set()
    for descriptor in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(descriptor).removeprefix("socket:[").rstrip("]"))
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in inodes:
                address, _, port = words[1].rpartition(":")
                found.append((address, int(port, 16)))
    return found


@pytest.mark.parametrize(
    ("seen", "uuids", "backend"),
    [
        (2, ["a", "b"], "cpu:gloo,cuda:nccl"),
        (1, ["a", "b"], "cpu:gloo,cuda:nccl"),  # srun --gpus-per-task=1: each sees its own as number 0
        (1, ["a", "a"], "gloo"),  # NCCL refuses two ranks of one device
    ],
)
def test_ranks_with_a_device_each_talk_by_nccl(
    seen: int, uuids: list[str], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU: what torch is asked for."""
    shared = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (shared | {"MASTER_PORT": free_port()}).items():
        monkeypatch.setenv(name, value)
    asked: list[tuple[int, str]] = []
    stores: list[object] = []  # rank 0's lives as long as the process group
    mine = threading.local()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuids[mine.rank]))

    def init(name: str, rank: int, store: object, **_: object) -> None:
        asked.append((rank, name))
        stores.append(store)

    monkeypatch.setattr(session.c10d, "init_process_group", init)

    def join(rank: int) -> None:
        mine.rank = rank
        ranks = Ranks(Path(), [], 2)
        ranks.rank = rank
        ranks.join()

    threads = [threading.Thread(target=join, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(asked) == [(0, backend), (1, backend)]


@pytest.mark.parametrize("size", [1, 2])
def test_under_a_launchers_variables_it_listens_on_one_address(size: int, model: Path, tmp_path: Path) -> None:
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    line = [sys.executable, str(SERVER), "--path", str(model), "--tensor_parallel", str(size)]
    line += ["--address_file", str(tmp_path / "address")]
    with (tmp_path / "log").open("wb") as log:
        processes = [
            subprocess.Popen(
                line, env=os.environ | shared | {"RANK": str(rank), "GRPO_KD_TEACHER_SECRET": SECRET}, stderr=log
            )
            for rank in range(size)
        ]
    try:
        wait_ready(processes[0], tmp_path / "address", tmp_path / "log")
        scores((tmp_path / "address").read_text().strip())
        # gloo's own listener between the ranks is on the machine's address
        stores = {int(shared["MASTER_PORT"]), int((tmp_path / "address").read_text().rpartition(":")[2])}
        assert {address for address, port in listeners(processes[0].pid) if port in stores} == {"0100007F"}
        processes[0].terminate()
        assert [process.wait(120) for process in processes] == [0] * size
    finally:
        for process in processes:
            process.kill()
            process.wait()
