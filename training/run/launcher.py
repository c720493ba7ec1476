"""What a launcher (deepspeed, torchrun, srun) gives a rank, before the ranks have met: number, port; and its end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist


def environment_rank() -> int:
    """Rank that the launcher gave this process; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def environment_world_size() -> int:
    """Ranks that the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def several_machines() -> bool:
    """Whether the launcher started ranks elsewhere too, as far as it says how many are here."""
    return 0 < _ranks_here() < environment_world_size()


def _ranks_here() -> int:
    """Ranks of this machine, as DeepSpeed's launcher or torchrun says; 0 where nobody does."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 0)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ensure_launcher_environment() -> None:
    """Make `python training/main.py` the same as one rank under the launcher."""
    # Long and short rows follow each other: without it the CUDA allocator's blocks fit neither.
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    if "RANK" in os.environ:
        return
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # any


def check_launcher() -> None:
    """Raises ValueError where srun alone has started the ranks, which then know nothing of each other; and where rank 0
    cannot have the port at which they meet: the deepspeed launcher's is always 29500, so of two runs on one machine
    the second would end in a trace. (torchrun has opened its port by now.)"""
    tasks, known = os.environ.get("SLURM_STEP_NUM_TASKS", "1"), {"RANK", "SLURM_PTY_PORT"} & os.environ.keys()
    if tasks != "1" and not known:  # of `srun --pty` one task alone has a shell
        raise ValueError(
            f"SLURM_STEP_NUM_TASKS = {tasks}: each of srun's tasks would be a run of its own; submit the run with "
            "slurm/submit.sh, or have srun start one torchrun on each node"
        )
    port = os.environ.get("MASTER_PORT", "")
    if os.environ.get("RANK") != "0" or not port.isdigit() or "TORCHELASTIC_RUN_ID" in os.environ:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(port)))
        except OSError as error:
            raise ValueError(
                f"--master_port {port}: {error.strerror}; another run may have it, so give a free one to the launcher: "
                f"deepspeed --master_port {free_port()} ..."
            ) from None


def join_on_cpu(meeting: str) -> None:
    """Meet the ranks of this machine that RANK and WORLD_SIZE speak of by a file, without DeepSpeed."""
    rank, ranks = environment_rank(), environment_world_size()
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)


def set_threads(asked: int | None) -> None:
    """So many threads, or this rank's share of the cores."""
    torch.set_num_threads(asked or max(1, len(os.sched_getaffinity(0)) // max(_ranks_here(), 1)))


def watch_launcher(interval_s: float = 1.0) -> None:
    """End this process, as by SIGTERM, when the launcher that started it is gone.

    `deepspeed` is two processes above a rank. Killing the first leaves the second and its ranks behind, so both are
    watched. Does nothing without that launcher, or where there is no /proc: the parent of another start may leave.
    """
    launcher = os.getppid()
    with contextlib.suppress(OSError):
        if b"deepspeed.launcher" in Path(f"/proc/{launcher}/cmdline").read_bytes():
            started = (launcher, _parent_of(launcher))
            thread = threading.Thread(target=_watch, args=(started, interval_s), name="launcher-watch", daemon=True)
            thread.start()


def _watch(started: tuple[int, int | None], interval_s: float) -> None:
    while (os.getppid(), _parent_of(started[0])) == started:
        time.sleep(interval_s)
    os.kill(os.getpid(), signal.SIGTERM)


def _parent_of(process: int) -> int | None:
    """Parent of a process, None where it is gone."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    return int(status.rpartition(")")[2].split()[1])
