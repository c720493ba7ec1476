"""The processes of one teacher: started together, joined into one process group, and never left alone."""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

logger = logging.getLogger("teacher")

STORE = "GRPO_KD_TEACHER_STORE"
"""Environment: port of rank 0's store, where no launcher brings one."""
COLLECTIVE_S = 1800
LEAVE_S = 25.0
"""Seconds from the first signal to the end, at most: less than launchers and SLURM wait before they kill."""


def launched() -> bool:
    """Whether torchrun or the like started this process as one of its ranks; then it has started the others too."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))


class Ranks:
    """The ranks of a teacher, seen from one of them. Without a launcher, rank 0 starts the others on this machine."""

    def __init__(self, script: Path, argv: Sequence[str], size: int) -> None:
        self._children: list[subprocess.Popen[bytes]] = []
        self._listener: socket.socket | None = None
        self.stopping = threading.Event()
        """Set when the teacher is to end; a rank that ends then has finished."""
        if not launched():
            # The socket is handed to torch's store later: nobody can take the port in between.
            self._listener = socket.create_server(("127.0.0.1", 0))
            os.environ |= {"RANK": "0", "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": ""}
            os.environ.pop("LOCAL_RANK", None)
            os.environ[STORE] = str(self._listener.getsockname()[1])
            if sys.platform == "linux":  # gloo needs no name resolution on one machine
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            # Each child ends with its standard input, so with this process however that ends.
            command = [sys.executable, str(script), *argv, "--exit_with_stdin"]
            for rank in range(1, size):
                environment = {**os.environ, "RANK": str(rank)}
                self._children.append(subprocess.Popen(command, env=environment, stdin=subprocess.PIPE))
            threading.Thread(target=self._watch, name="ranks", daemon=True).start()
        self.rank = int(os.environ["RANK"])

    def _watch(self) -> None:
        """A rank that dies takes the whole server down; the others would wait for it for ever."""
        while True:
            time.sleep(0.5)
            for child in self._children:
                code = child.poll()
                if code is not None and not (self.stopping.is_set() and code == 0):
                    logger.error("a tensor-parallel rank ended with %d", code)
                    os._exit(2 if code == 2 else 1)

    def wait(self) -> None:
        """Until the ranks that were started here have ended."""
        for child in self._children:
            child.wait(timeout=10)

    def join(self) -> Any:
        """Make the default process group, which is the tensor-parallel group; this rank's torch.device."""
        import torch

        from inference.protocol.session import c10d as dist

        rank, size = self.rank, int(os.environ["WORLD_SIZE"])
        backend, device = "gloo", torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
            torch.cuda.set_device(device)
        # The store is torchrun's, or rank 0's with a socket of its own: torch would listen on all interfaces.
        where, torchrun = ("127.0.0.1", int(os.environ.get(STORE, "0"))), False
        if STORE not in os.environ:
            where = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
            torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            self._listener = _listener(*where) if rank == 0 and not torchrun else None
        opened, master = None if self._listener is None else self._listener.detach(), rank == 0 and not torchrun
        store = dist.TCPStore(*where, size, is_master=master, wait_for_workers=False, master_listen_fd=opened)
        if torchrun:
            store = dist.PrefixStore(f"teacher/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        if device.type == "cuda":
            found = _devices(store, rank, size, str(torch.cuda.get_device_properties(device).uuid))
            if found == size:
                backend = "cpu:gloo,cuda:nccl"
            elif rank == 0:  # NCCL refuses two ranks on one device; gloo carries CUDA tensors through the host
                logger.warning(
                    "teacher.tensor_parallel = %d: more than its %d GPUs, so ranks share them and talk through the "
                    "host, which is slow; use %d",
                    size,
                    found,
                    found,
                )
        timeout = timedelta(seconds=COLLECTIVE_S)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        return device

    def handle_signals(self, *, ignore: bool) -> None:
        """SIGTERM, SIGINT, SIGUSR1 and SIGHUP stop rank 0, which tells the others. Those ignore what is sent to all of
        a group. A HUP that `nohup` has switched off stays so.

        `ignore`: a server that ends with its standard input belongs to a trainer and ignores them too. A launcher that
        terminates the trainer's process tree, or SLURM, whose USR1 reaches every process of a step, would otherwise
        take the teacher away before the trainer has finished its step.
        """

        def stop(number: int, frame: FrameType | None) -> None:
            if not self.stopping.is_set():
                self.stopping.set()
                threading.Thread(target=self._leave, name="leave", daemon=True).start()

        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            if signal.getsignal(name) is not signal.SIG_IGN:
                signal.signal(name, signal.SIG_IGN if ignore or self.rank != 0 else stop)

    def _leave(self) -> None:
        """A server that is asked to stop is gone some seconds later, whatever it is doing."""
        time.sleep(LEAVE_S)
        logger.warning("not all that was asked is answered after %.0f s; leaving", LEAVE_S)
        os._exit(0)


def _devices(store: Any, rank: int, size: int, mine: str) -> int:
    """How many different devices the ranks have: a launcher may show all of a machine to each of its ranks, or one
    (`srun --gpus-per-task=1`). Collective."""
    store.set_timeout(timedelta(seconds=COLLECTIVE_S))
    store.set(f"device/{rank}", mine)
    return len({store.get(f"device/{one}") for one in range(size)})


def _listener(host: str, port: int) -> socket.socket | None:
    """A socket at the address that a launcher named. None where that is not one of this machine's, or where its name
    stands for one that the other nodes do not see: then torch listens on all interfaces."""
    several = os.environ["WORLD_SIZE"] != os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
    try:
        address = socket.gethostbyname(host)
        return None if several and address.startswith("127.") else socket.create_server((address, port))
    except OSError:
        return None


def exit_with_stdin() -> None:
    """End this process at once when standard input ends, or when the parent is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            readable, _, _ = select.select([0], [], [], 1.0)
            if readable and not os.read(0, 4096):
                os._exit(0)
        os._exit(1)

    threading.Thread(target=watch, name="stdin", daemon=True).start()
