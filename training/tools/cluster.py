"""`training/main.py --doctor --cluster`: can the nodes of this job work together? One line a check, without any model.

    bash slurm/submit.sh stage2_grpo --doctor --cluster --config my.yaml     with the nodes that the run will have

What it asks: one set of versions everywhere, collectives that add up right and how fast they are, files that all ranks
see, a teacher's address that all reach, limits. Every rank must come to each check.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from configs.schema import RunConfig
from training import distributed
from training.run import launcher
from training.student.deepspeed_engine import start_distributed
from training.tools.doctor import Finding, report, say_finding

PATIENCE_S = 30.0
"""Seconds in which a file that one node has written has to be seen by the others."""
SKEW_S = 5.0
"""Seconds that the nodes' clocks may differ: time limits and claims on folders go by them."""
DESCRIPTORS = 4096
"""Open files and connections that a process should be allowed."""
COLLECTIVE = 1 << 24
"""float32 numbers that are added up over the ranks."""


def cluster(config: RunConfig) -> int:
    """Make every check; returns the exit code. Collective. Raises ValueError where there is no launcher to speak of."""
    launcher.check_launcher()
    start_distributed()
    checks: dict[str, Callable[[RunConfig], Finding]] = {
        "nodes": nodes,
        "versions": versions,
        "collectives": collectives,
        "shared files": shared_files,
        "teacher port": teacher_port,
        "limits": limits,
        "clocks": clocks,
    }
    found = []
    for name, check in checks.items():
        found.append(say_finding(name, check(config)))
        distributed.barrier()
    return report(found)


def nodes(config: RunConfig) -> Finding:
    """Where the ranks are."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    places = Counter(distributed.gather_strings([f"{platform.node()} ({device})"]))
    ranks = ", ".join(f"{count} on {place}" for place, count in places.items())
    return Finding(True, f"{distributed.world_size()} ranks: {ranks}")


def versions(config: RunConfig) -> Finding:
    """Python, torch, CUDA, driver and NCCL are the same on every rank."""
    mine = {"python": platform.python_version(), "torch": torch.__version__, "CUDA": str(torch.version.cuda)}
    if torch.cuda.is_available():
        mine |= {"NCCL": ".".join(map(str, torch.cuda.nccl.version())), "driver": _driver()}
    return alike(distributed.gather_strings([json.dumps({"node": platform.node(), **mine})]))


def alike(described: Sequence[str]) -> Finding:
    """Of each rank a JSON object with its node and versions."""
    ranks = [json.loads(one) for one in described]
    for name in [name for name in ranks[0] if name != "node"]:
        if len({rank.get(name) for rank in ranks}) > 1:
            found = ", ".join(sorted({f"{rank.get(name)} on {rank['node']}" for rank in ranks}))
            return Finding(False, f"{name} differs: {found}; load the same modules or container on every node")
    return Finding(True, ", ".join(f"{name} {value}" for name, value in ranks[0].items() if name != "node"))


def _driver() -> str:
    """Version of the kernel's driver, where the kernel says it."""
    with suppress(OSError, IndexError):
        return Path("/proc/driver/nvidia/version").read_text().split("Kernel Module")[1].split()[0]
    return "unknown"


def collectives(config: RunConfig) -> Finding:
    """A sum over the ranks is right, and how fast a large one is."""
    if distributed.world_size() == 1:
        return Finding(None, "one rank has nobody to talk to")
    device = distributed.device()
    by = "gloo" if device.type == "cpu" else "NCCL"
    values = torch.full((COLLECTIVE,), float(distributed.rank() + 1), device=device)
    right = bool((distributed.sum_in_place(values) == sum(range(1, distributed.world_size() + 1))).all())
    rounds, began = 3, time.perf_counter()
    for _ in range(rounds):
        distributed.sum_in_place(values.fill_(1.0))
    float(values[0])  # waits for the device
    rate = rounds * values.nbytes / (time.perf_counter() - began) / 1e9
    wrong = distributed.any_rank(not right)
    return Finding(
        not wrong,
        f"{by} adds up {values.nbytes >> 20} MiB at {rate:.2f} GB/s"
        if not wrong
        else f"{by} gives a wrong sum; name the device between the nodes in GRPO_KD_INTERFACE",
    )


def shared_files(config: RunConfig) -> Finding:
    """What rank 0 writes into runs_dir and cache_dir is seen by all, who may write there as well."""
    nonce = distributed.gather_strings([os.urandom(8).hex()])[0]
    problems = [_unseen(key, Path(getattr(config, key)), nonce) for key in ("runs_dir", "cache_dir")]
    if said := next(filter(None, distributed.gather_strings([" and ".join(filter(None, problems))])), ""):
        return Finding(False, f"{said}; choose folders on a file system that all nodes share")
    return Finding(True, f"runs_dir {config.runs_dir} and cache_dir {config.cache_dir} are one folder for every rank")


def _unseen(key: str, folder: Path, nonce: str) -> str:
    """What is wrong with a folder on this rank; "" for nothing. Collective."""
    mark, problem = folder / f".cluster-{nonce}", ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if distributed.is_main():
            mark.write_text(nonce)
        own = folder / f"{mark.name}-{distributed.rank()}"
        own.write_text(nonce)
        own.unlink()
    except OSError as error:
        problem = f"{key}: {platform.node()} cannot write {folder} ({error.strerror})"
    distributed.barrier()
    deadline = time.monotonic() + PATIENCE_S
    while not problem and not mark.is_file():
        if time.monotonic() > deadline:
            problem = f"{key}: {platform.node()} does not see what rank 0 wrote into {folder.resolve()}"
        time.sleep(0.05)
    distributed.barrier()
    with suppress(OSError):
        if distributed.is_main():
            mark.unlink()
    return problem


def teacher_port(config: RunConfig) -> Finding:
    """Every rank reaches an address of rank 0's node at which a teacher would listen."""
    if config.teacher.address is not None:
        return Finding(None, f"teacher.address = {config.teacher.address}: the server is started elsewhere")
    with socket.socket() as listening:
        said = ""
        if distributed.is_main():
            try:
                listening.bind((config.teacher.interface, config.teacher.port))
                listening.listen(distributed.world_size())
                said = "{}:{}".format(*listening.getsockname())
            except OSError as error:
                said = f"!{error.strerror}"
        address = distributed.gather_strings([said])[0]
        if address.startswith("!"):
            wanted = f"teacher.interface = {config.teacher.interface}, teacher.port = {config.teacher.port}"
            return Finding(False, f"{wanted}: {address[1:]}; name an address of rank 0's node and a free port, or 0")
        host, _, port = address.rpartition(":")
        problem = ""
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            problem = f"{platform.node()} does not reach {address} ({error})"
        problem = next(filter(None, distributed.gather_strings([problem])), "")
    mend = "set teacher.interface to the address of rank 0's node in the network between the nodes, or open the port"
    return Finding(not problem, f"{problem}; {mend}" if problem else f"every rank reaches {address}")


def limits(config: RunConfig) -> Finding:
    """Open files of a process, on the rank that may have the fewest."""
    least = -int(distributed.max_over_ranks(-float(resource.getrlimit(resource.RLIMIT_NOFILE)[1])))
    return Finding(least >= DESCRIPTORS, f"a process may open {least} files (wanted {DESCRIPTORS}: ulimit -n)")


def clocks(config: RunConfig) -> Finding:
    """How far the nodes' clocks are apart."""
    distributed.barrier()
    now = time.time()
    apart = distributed.max_over_ranks(now) + distributed.max_over_ranks(-now)
    return Finding(apart <= SKEW_S, f"at most {apart:.1f} s apart (allowed {SKEW_S:.0f}; NTP keeps them together)")
