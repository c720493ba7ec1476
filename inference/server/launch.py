"""A teacher of one's own: a server process on this machine that lives exactly as long as its owner.

However the owner ends, SIGKILL included, the pipe to the server's standard input closes and the server ends with all
its ranks. It is in a process group of its own, so that Ctrl-C in the terminal reaches the owner alone, who can still
ask the teacher while it writes its checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

from configs.io.files import read_json
from configs.schema import TeacherConfig
from inference.model.backend import check_teacher
from inference.model.files import safetensors_files

SECRET = "GRPO_KD_TEACHER_SECRET"
_SERVER = Path(__file__).resolve().parents[1] / "serve_teacher.py"
_LAUNCHER = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"}
_LAUNCHER |= {"CROSS_RANK", "CROSS_SIZE"}
_LAUNCHER_PREFIXES = ("TORCHELASTIC_", "GRPO_KD_TEACHER_", "OMPI_", "PMI_", "PMIX_", "GROUP_", "ROLE_")
_REFUSED = "serve_teacher: error: "
_NOT_FLAGS = ("address", "devices")
SLOW_DISK = 50e6
"""Bytes a second."""

log = logging.getLogger(__name__)


class TeacherDied(RuntimeError):
    """The server ended, or was not ready in time, while it was started. `mistake`: it named one in its settings."""

    def __init__(self, said: str, *, mistake: bool = False) -> None:
        super().__init__(said)
        self.mistake = mistake


@dataclass(frozen=True)
class LocalTeacher:
    """A running server. `stop`, or leaving the `with` block, ends it."""

    process: subprocess.Popen[bytes]
    """Rank 0."""
    address: str
    """host:port."""
    secret: str
    """What clients must know."""
    log: Path
    """The server's log file."""

    def stop(self) -> None:
        """End it now; kill it if that takes too long."""
        _stop(self.process, 15.0)

    def __enter__(self) -> LocalTeacher:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def start_local_teacher(config: TeacherConfig, model_dir: Path, work_dir: Path) -> LocalTeacher:
    """Start a server for `model_dir` (in place of config.path) and wait until it is ready.

    Its log is work_dir/teacher.log. TeacherDied with the log's last lines if it dies first.
    """
    config = replace(config, path=str(model_dir.resolve()))
    try:
        config = replace(config, backend=check_teacher(config)[0])
        placed = place(config, model_dir)
    except ValueError as error:
        raise TeacherDied(str(error), mistake=True) from None
    work_dir.mkdir(parents=True, exist_ok=True)
    secret = secrets.token_hex(32)
    address_file, log_file = work_dir / "teacher.address", work_dir / "teacher.log"
    address_file.unlink(missing_ok=True)
    command = [sys.executable, str(_SERVER), "--exit_with_stdin", "--address_file", str(address_file)]
    for field in fields(TeacherConfig):
        if field.name not in _NOT_FLAGS and getattr(config, field.name) is not None:
            command += [f"--teacher.{field.name}", str(getattr(config, field.name))]
    with log_file.open("ab") as output:
        process = subprocess.Popen(
            command,
            env={**launcherless_environment(), **placed, SECRET: secret, "OMP_NUM_THREADS": str(config.threads)},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            process_group=0,
        )
    try:
        address = _wait_ready(process, address_file, log_file, start_timeout_s(model_dir))
    except BaseException:
        _stop(process, 5.0)
        raise
    threading.Thread(target=_tell_end, args=(process, log_file), name="teacher-end", daemon=True).start()
    return LocalTeacher(process, address, secret, log_file)


def start_timeout_s(model_dir: Path) -> float:
    """Seconds after which a server should be ready: ten minutes, and what a slow disk takes to give the weights."""
    return 600.0 + sum(file.stat().st_size for file in safetensors_files(model_dir)) / SLOW_DISK


def place(config: TeacherConfig, model_dir: Path) -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES of a server that is started beside a trainer; nothing on a machine without CUDA.

    Raises ValueError where the weights cannot be in the memory of the devices.
    """
    import torch

    if not torch.cuda.is_available():
        return {}
    if config.url is not None:
        return {"CUDA_VISIBLE_DEVICES": ""}
    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    # CUDA takes the first of them that it can: of several MIG instances one.
    visible = named[:count] if len(named) >= count else [str(i) for i in range(count)]
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")) or 1)
    chosen, shared = choose_devices(config, visible, ranks)
    total = min(torch.cuda.get_device_properties(i).total_memory for i in range(count))
    need = weight_bytes(model_dir, config.dtype) * -(-config.tensor_parallel // len(chosen)) // config.tensor_parallel
    if need > total:
        raise ValueError(
            f"teacher.tensor_parallel = {config.tensor_parallel}: {need / 1e9:.0f} GB of weights for each of the CUDA "
            f"devices {','.join(chosen)}, which have {total / 1e9:.0f} GB; raise it, name more in teacher.devices, or "
            "give the address of a server elsewhere in teacher.address"
        )
    if shared:
        log.warning(
            "teacher.devices: the trainer's %d ranks leave too few of %d CUDA devices, so the teacher shares theirs; "
            "its weights take %.1f of %.1f GB on each",
            ranks,
            count,
            need / 1e9,
            total / 1e9,
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(chosen)}


def choose_devices(config: TeacherConfig, visible: list[str], ranks: int) -> tuple[list[str], bool]:
    """Devices of a teacher beside `ranks` ranks of a trainer, which use the first ones; whether it shares theirs."""
    if config.devices is not None:
        chosen = [name.strip() for name in config.devices.split(",") if name.strip()]
        unknown = sorted(set(chosen) - set(visible))
        if unknown or not chosen:
            raise ValueError(
                f"teacher.devices = {config.devices!r}: no CUDA device {', '.join(unknown) or 'is named'}; there are "
                f"{', '.join(visible)}"
            )
        return chosen, bool(set(chosen) & set(visible[:ranks]))
    left = visible[ranks:]
    if len(left) >= config.tensor_parallel:
        return left[: config.tensor_parallel], False
    return visible, True


def weight_bytes(model_dir: Path, dtype: str) -> int:
    """Bytes of a model's weights in the teacher's type, from the sizes of its files."""
    stored = sum(file.stat().st_size for file in safetensors_files(model_dir))
    kept = read_json(model_dir / "config.json")
    half = str(kept.get("dtype") or kept.get("torch_dtype")) in ("bfloat16", "float16")
    return stored * (2 if dtype == "bfloat16" else 4) // (2 if half else 4)


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
        if code == 2 and _REFUSED in (said := _tail(log)):
            raise TeacherDied(said.rpartition(_REFUSED)[2].splitlines()[0], mistake=True)
        if code is not None:
            raise TeacherDied(f"the teacher ended with code {code} while starting; {log} ends with:\n{_tail(log)}")
        if time.monotonic() > deadline:
            raise TeacherDied(f"the teacher was not ready after {timeout_s:.0f} s; {log} ends with:\n{_tail(log)}")
        time.sleep(0.05)
    return address_file.read_text(encoding="utf-8").strip()


def _tell_end(process: subprocess.Popen[bytes], log_file: Path) -> None:
    """Say why a server has ended by itself, while its clients still look for it."""
    code = process.wait()
    if process.stdin is not None and not process.stdin.closed:
        log.error("the teacher ended with code %d; %s ends with:\n%s", code, log_file, _tail(log_file))


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
