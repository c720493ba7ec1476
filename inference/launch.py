"""A teacher of one's own: a server process on this machine that lives exactly as long as its owner.

However the owner ends, SIGKILL included, the pipe to the server's standard input closes and the server ends with all
its ranks. It is in a process group of its own, so that Ctrl-C in the terminal reaches the owner alone, who can still
ask the teacher while it writes its checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

from configs.schema import TeacherConfig
from inference.checks import check_teacher

SECRET = "GRPO_KD_TEACHER_SECRET"
_SERVER = Path(__file__).resolve().parent / "serve_teacher.py"
_LAUNCHER = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK",
    "CROSS_SIZE",
)  # fmt: skip
_LAUNCHER_PREFIXES = ("TORCHELASTIC_", "GRPO_KD_TEACHER_", "OMPI_", "PMI_", "PMIX_", "GROUP_", "ROLE_")
_NOT_FLAGS = ("address",)


class TeacherDied(RuntimeError):
    """The server ended, or was not ready in time, while it was started."""


class LocalTeacher:
    """A running server. `stop`, or leaving the `with` block, ends it."""

    def __init__(self, process: subprocess.Popen[bytes], address: str, secret: str, log: Path) -> None:
        self._process = process
        self.address = address
        """host:port."""
        self.secret = secret
        """What clients must know."""
        self.log = log
        """The server's log file."""

    @property
    def pid(self) -> int:
        """Process id of rank 0."""
        return self._process.pid

    def poll(self) -> int | None:
        """Exit code of the server, None while it runs."""
        return self._process.poll()

    def stop(self, timeout_s: float = 15.0) -> None:
        """End it now; kill it if that takes longer than `timeout_s`."""
        _stop(self._process, timeout_s)

    def __enter__(self) -> LocalTeacher:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def start_local_teacher(
    config: TeacherConfig, model_dir: Path, work_dir: Path, *, start_timeout_s: float = 600.0
) -> LocalTeacher:
    """Start a server for `model_dir` (in place of config.path) and wait until it is ready.

    Its log is work_dir/teacher.log. TeacherDied with the log's last lines if it dies first.
    """
    check_teacher(model_dir, config.tensor_parallel)
    work_dir.mkdir(parents=True, exist_ok=True)
    secret = secrets.token_hex(32)
    address_file, log = work_dir / "teacher.address", work_dir / "teacher.log"
    address_file.unlink(missing_ok=True)
    command = [sys.executable, str(_SERVER), "--exit_with_stdin", "--address_file", str(address_file)]
    for field in fields(TeacherConfig):
        if field.name not in _NOT_FLAGS:
            value = str(model_dir.resolve()) if field.name == "path" else getattr(config, field.name)
            command += [f"--teacher.{field.name}", str(value)]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            env={**launcherless_environment(), SECRET: secret, "OMP_NUM_THREADS": str(config.threads)},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            process_group=0,
        )
    try:
        address = _wait_ready(process, address_file, log, start_timeout_s)
    except BaseException:
        _stop(process, 5.0)
        raise
    return LocalTeacher(process, address, secret, log)


def launcherless_environment() -> dict[str, str]:
    """The environment without what a launcher (deepspeed, torchrun, mpirun) left for the owner's own ranks."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCHER and not name.startswith(_LAUNCHER_PREFIXES)
    }


def _wait_ready(process: subprocess.Popen[bytes], address_file: Path, log: Path, timeout_s: float) -> str:
    deadline = time.monotonic() + timeout_s
    while not address_file.is_file():
        code = process.poll()
        if code is not None:
            raise TeacherDied(f"the teacher ended with code {code} while starting; {log} ends with:\n{_tail(log)}")
        if time.monotonic() > deadline:
            raise TeacherDied(f"the teacher was not ready after {timeout_s:.0f} s; {log} ends with:\n{_tail(log)}")
        time.sleep(0.05)
    return address_file.read_text(encoding="utf-8").strip()


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _stop(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Close the pipe, which ends the server and its ranks at once (its owner waits for no answer); kill if it hangs."""
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout_s)
    if process.poll() is None:
        process.kill()
    process.wait()
