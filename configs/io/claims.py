"""Who writes into a folder: one program at a time, whatever machine it runs on.

The claim is a file with host, process and since when, put there by a hard link, which one of several makers gets on NFS
too. A claim whose process has ended on this machine is taken over; so is one of a SLURM job that was started again, or
runs no more. Of any other process on another machine nothing can be known: its claim stands.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FILE = "in_use.json"


def claim(folder: Path) -> None:
    """From now on this process alone writes into `folder`, which is made. Raises ValueError where another one does, or
    where nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(folder):
            stale = _content(folder / FILE)
            if (problem := in_use(folder)) is not None:
                raise ValueError(problem)
            if not _removed(folder / FILE, stale) or not _make(folder):
                raise ValueError(in_use(folder) or f"{folder}: another program has just begun in it; start again")
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}); choose another folder") from None


def release(folder: Path) -> None:
    """Give up this process's claim, if it has one."""
    with contextlib.suppress(OSError, ValueError):
        if _is_me(json.loads((folder / FILE).read_text(encoding="utf-8"))):
            (folder / FILE).unlink()


def in_use(folder: Path, environment: Mapping[str, str] = os.environ) -> str | None:
    """Who else writes into the folder, in a line with the mend; None where nobody does."""
    path = folder / FILE
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        host, process, since = (holder[key] for key in ("host", "process", "since"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"{path} cannot be read, so another program may be writing there; delete that file if none is"
    mine = _me(environment)
    if _is_me(holder):
        return None
    here, same_boot = host == mine["host"], holder.get("boot") == mine["boot"]
    visible = here and holder.get("processes") == mine["processes"]
    if (here and not same_boot) or (visible and _began(process) != holder.get("began")):
        return None
    same_job = mine["slurm_job"] is not None and holder.get("slurm_job") == mine["slurm_job"]
    if not visible and same_job and int(holder.get("slurm_restart", 0)) < int(mine["slurm_restart"]):
        return None
    known = holder.get("slurm_cluster") == mine["slurm_cluster"] is not None and path.stat().st_uid == os.getuid()
    if not visible and known and _ended(holder["slurm_job"]):
        return None
    mend = f"wait for it, or end it (kill {process})" if visible else f"wait for it; if it has ended, delete {path}"
    return f"{folder} is in use by process {process} on {host} since {since}: {mend}, or choose another name"


def _ended(job: str) -> bool:
    """Whether a job of this cluster runs no more: one that lost its node, or was killed at its time limit, leaves its
    claim to the next job of a chain. False where SLURM cannot be asked. (It may hide the jobs of others.)"""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    try:
        asked = ["squeue", "--noheader", "--job", job, "--format", "%A %T"]
        done = subprocess.run(asked, env=plain, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    if done.returncode != 0:
        return "Invalid job id" in done.stderr  # SLURM forgets a job some minutes after its end
    states = (line.split() for line in done.stdout.splitlines())  # those of other tasks of an array too
    return all(number != job or state == "PENDING" for number, state in states)


def _me(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """This process, as its claim says it."""
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "slurm_job": environment.get("SLURM_JOB_ID"),
        "slurm_cluster": environment.get("SLURM_CLUSTER_NAME"),
        "slurm_restart": int(environment.get("SLURM_RESTART_COUNT", "0")),
        "began": _began(os.getpid()),
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "processes": os.readlink("/proc/self/ns/pid"),  # a container's numbers of processes are its own
    }


def _is_me(holder: Mapping[str, Any]) -> bool:
    mine = _me()
    return all(holder.get(key) == mine[key] for key in ("host", "process", "began", "boot", "processes"))


def _began(process: object) -> str | None:
    """When a process of this machine began, in clock ticks since the start of the machine; None where it has ended.
    The number of a process may be given to another one, but not at the same time."""
    try:
        words = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if words[0] in "ZX" else words[19]


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _removed(path: Path, stale: bytes | None) -> bool:
    """Take the stale claim away; False where there is another one by now, of a program that took it over more quickly,
    perhaps on another machine."""
    aside = path.with_name(f".{FILE}.{secrets.token_hex(8)}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)  # one of several gets it
        if aside.read_bytes() != stale:
            aside.rename(path)
            return False
        aside.unlink()
    return True


def _make(folder: Path) -> bool:
    """Put the claim's file where there is none; whether it is ours then. Raises OSError."""
    path, beside = folder / FILE, folder / f".{FILE}.{secrets.token_hex(8)}"
    content = json.dumps(_me(), indent=1) + "\n"
    try:
        beside.write_text(content, encoding="utf-8")
        try:
            os.link(beside, path)
        except FileExistsError:
            pass
        except OSError:  # no hard links there
            with contextlib.suppress(FileExistsError), path.open("x", encoding="utf-8") as file:
                file.write(content)
        return _is_me(json.loads(path.read_text(encoding="utf-8")))  # over NFS the answer to a link may be lost
    except ValueError:
        return False
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Of this machine's processes."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # no locks there: the link decides alone
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
