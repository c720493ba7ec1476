"""Servers started by hand, as tests do it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.forked import Forked
from tests.support.runs import ROOT

SERVER = ROOT / "inference" / "serve_teacher.py"
SECRET = "a secret for tests"
Started = subprocess.Popen[bytes] | Forked


def serve(
    model_dir: Path, address_file: Path, log: Path, *flags: str, tensor_parallel: int = 1
) -> subprocess.Popen[bytes]:
    """A server that is ready to be asked. What it says is appended to `log`."""
    address_file.unlink(missing_ok=True)
    command = [sys.executable, str(SERVER), "--path", str(model_dir), "--tensor_parallel", str(tensor_parallel)]
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*command, *flags, "--address_file", str(address_file)],
            env={**os.environ, "GRPO_KD_TEACHER_SECRET": SECRET},
            stderr=output,
        )
    wait_ready(process, address_file, log)
    return process


def serve_forked(model_dir: Path, address_file: Path, log: Path, *flags: str, tensor_parallel: int = 1) -> Forked:
    """As `serve`, for tests that are not about the server's process: rank 0 is forked."""
    address_file.unlink(missing_ok=True)
    command = [sys.executable, str(SERVER), "--path", str(model_dir), "--tensor_parallel", str(tensor_parallel), *flags]
    process = Forked([*command, "--address_file", str(address_file)], log, log, GRPO_KD_TEACHER_SECRET=SECRET)
    wait_ready(process, address_file, log)
    return process


@contextlib.contextmanager
def served(model_dir: Path, folder: Path) -> Iterator[tuple[str, ...]]:
    """Options of a run that asks this model at a forked server; the secret is SECRET."""
    server = serve_forked(model_dir, folder / "address", folder / "log")
    try:
        yield ("--teacher.address", str(folder / "address"))
    finally:
        server.kill()
        server.wait()


def wait_ready(process: Started, address_file: Path, log: Path, seconds: float = 400) -> None:
    """Until the address file is there."""
    deadline = time.monotonic() + seconds
    while not address_file.is_file():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def commands_with(text: str) -> dict[int, str]:
    """Processes whose command line holds `text`."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if text in command:
                found[int(entry.name)] = command
    return found


def wait_until_gone(text: str, seconds: float = 40.0) -> None:
    """Until no process has `text` on its command line."""
    deadline = time.monotonic() + seconds
    while commands_with(text):
        assert time.monotonic() < deadline, f"still running: {commands_with(text)}"
        time.sleep(0.1)


def memory_kib(pid: int, field: str = "VmRSS") -> int:
    """A line of /proc/PID/status."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(f"{field}:")))
