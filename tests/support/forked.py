"""Programs of this repository as forks of one process that has imported the heavy libraries.

Imports are most of a tiny run: 5 s of processor time in a trainer, 4 in its teacher, 2 in its report. `install` lets
`subprocess` fork the programs that `_program` knows from a prepared process instead of executing them; a forked program
does the same with those it starts. It has the pid, parent, group, descriptors, working folder, environment and command
line that it would have had, and runs its script as __main__. What differs in a variable that may be read at import (all
but `AT_RUN_TIME`) is executed as ever, and so is everything where GRPO_KD_TESTS_FORK is 0 (fixture `real_starts`).
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SWITCH, PAGES = "GRPO_KD_TESTS_FORK", "GRPO_KD_TESTS_PAGES"
REPORT = [sys.executable, str(ROOT / "eval" / "report.py")]
# Not those that measure their own memory: a fork begins with that of all imports.
SCRIPTS = {
    ROOT / name
    for name in (
        "training/main.py", "training/sft.py", "training/pretrain.py", "training/data/demo/models.py",
        "training/tools/doctor.py", "training/teacher/api_teacher.py", "inference/serve_teacher.py",
        "eval/report.py", "eval/heldout.py", "eval/measure.py", "eval/run_experiment.py",
        "tests/support/rank_worker.py", "tests/support/doctor_worker.py", "tests/support/teacher_ranks.py",
        "tests/support/started.py",
    )
}  # fmt: skip
MODULES = {"deepspeed.launcher.launch"}
IMPORTED = (
    "training.stage2", "training.supervised", "training.tools.doctor", "training.data.demo.resolve",
    "inference.server.engine", "inference.server.server", "inference.server.self_test", "inference.model.scoring",
    "transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama", "accelerate",
    "deepspeed.launcher.runner", "deepspeed.launcher.launch", "deepspeed.moe.ep_count",
    "deepspeed.runtime.hybrid_engine", "torch.utils.tensorboard", "eval.pages.report_page",
    "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg", "babel.numbers", "countryinfo",
    "docstring_parser", "attrs",
)  # fmt: skip
# Variables that no library reads while it is imported.
AT_RUN_TIME = re.compile(
    "RANK|WORLD_SIZE|LOCAL_.*|CROSS_.*|MASTER_.*|GRPO_KD_.*|SLURM_.*|GLOO_.*|TORCHELASTIC_.*|TORCH_FORCE_.*"
    "|PYTORCH_.*ALLOC_CONF|OPENAI_API_KEY|DS_ACCELERATOR|PATH|PWD|OLDPWD|SHLVL|_|PYTEST_.*|PYTHONWARNINGS"
    "|PYTORCH_NVML_.*|TORCHINDUCTOR_.*|TORCH_CPP_LOG_LEVEL|TOKENIZERS_PARALLELISM"
)
LONGEST = 32768  # bytes of a command line
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER


class Forker:
    """What `subprocess` calls in place of its own fork and exec. `base`: the variables under which was imported."""

    def __init__(self, base: Mapping[str, str], connection: socket.socket | None = None) -> None:
        self._base = base
        self._connection = connection
        self._execute = subprocess._fork_exec  # type: ignore[attr-defined]
        self._lock = threading.Lock()
        self._libc = ctypes.CDLL(None)

    def __call__(self, args: Sequence[str | bytes], executables: Sequence[bytes], *rest: Any) -> int:
        (close_fds, keep, cwd, environment, in_read, _, _, out_write, _, err_write, _, status, _, session, group,
         gid, gids, uid, umask, prepare, _) = rest  # fmt: skip
        words = [os.fsdecode(word) for word in args]
        pairs = (os.fsdecode(pair).partition("=") for pair in environment or ())
        wanted = {k: v for k, _, v in pairs} if environment is not None else dict(os.environ)
        plain = close_fds and tuple(keep) == (status,) and umask == -1 and not any((gid, gids, uid, prepare))
        if words[:2] == REPORT and wanted.get(PAGES) == "0":  # 3 s of drawing that the test does not look at
            return int(self._execute(["true"], [b"/bin/true", b"/usr/bin/true"], *rest))
        if plain and _program(words) and _same_imports(wanted, self._base):
            message = {
                "words": words, "environment": wanted, "cwd": os.path.abspath(os.fsdecode(cwd or ".")),
                "session": session, "group": group,
                "ignored": [s for s in signal.valid_signals() if signal.getsignal(s) is signal.SIG_IGN],
            }  # fmt: skip
            ends = [given if given >= 0 else n for n, given in enumerate((in_read, out_write, err_write))]
            with self._lock:
                if self._connection is None:
                    self._connection = _prepare(self._base)
                self._libc.prctl(_SUBREAPER, 1, 0, 0, 0)  # a process whose parent ends becomes a child of this one
                try:
                    socket.send_fds(self._connection, [json.dumps(message).encode()], ends)
                    answer = self._connection.recv(32)
                finally:
                    self._libc.prctl(_SUBREAPER, 0, 0, 0, 0)
            assert answer, "the process that forks programs has ended: python -m tests.support.forked says why"
            return int(answer)
        return int(self._execute(args, executables, *rest))


def _program(words: Sequence[str]) -> tuple[str, list[str]] | None:
    """(script or module, sys.argv) where a command line starts one of ours."""
    if words[0] == "deepspeed" or words[0] == str(Path(sys.executable).parent / "deepspeed"):
        path = str(Path(sys.executable).parent / "deepspeed")
        return path, [path, *words[1:]]
    if words[0] != sys.executable:
        return None
    rest = [*words[1:]]
    if rest[:1] == ["-u"]:
        rest = rest[1:]
    if rest[:1] == ["-m"] and rest[1] in MODULES:
        return rest[1], rest[1:]
    return (rest[0], rest) if rest and ROOT / rest[0] in SCRIPTS else None


def _same_imports(wanted: Mapping[str, str], base: Mapping[str, str]) -> bool:
    different = {name for name in wanted.keys() | base.keys() if wanted.get(name) != base.get(name)}
    return all(AT_RUN_TIME.fullmatch(name) for name in different) and wanted.get(SWITCH) != "0"


def install(base: Mapping[str, str]) -> None:
    """From now on `subprocess` forks our programs. What is imported for them is imported with the variables `base`.

    Not where CUDA may be in use, which no fork survives, nor where coverage is measured, which begins with a process.
    """
    measured = any(name.startswith("COVERAGE_") for name in base)
    if sys.platform.startswith("linux") and not Path("/dev/nvidiactl").exists() and not measured:
        subprocess._fork_exec = Forker(base)  # type: ignore[attr-defined]


def _prepare(base: Mapping[str, str]) -> socket.socket:
    """Start the process that forks; it ends when this one has closed the socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.forked", str(theirs.fileno()), " " * LONGEST],
            cwd=ROOT,
            env={**base, "TORCH_CPP_LOG_LEVEL": "ERROR"},  # as serve_teacher.py sets it before it imports torch
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    return ours


def _serve(connection: socket.socket, base: Mapping[str, str], imported: Mapping[str, str]) -> list[str]:
    """Fork until whoever asks has gone. Returns in each program's process, with the command line."""
    while True:
        data, ends, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        if not data:
            os._exit(0)
        wanted = json.loads(data)
        told, tell = os.pipe()
        wait, go = os.pipe()
        between = os.fork()
        if between == 0:
            if os.fork() > 0:
                os._exit(0)
            if wanted["session"]:
                os.setsid()
            if (wanted["group"] if wanted["group"] is not None else -1) >= 0:
                os.setpgid(0, wanted["group"])
            os.write(tell, str(os.getpid()).encode())
            os.read(wait, 1)  # until the one between has gone and the asker is the parent
            return _become(wanted, ends, base, imported)
        os.waitpid(between, 0)
        connection.send(os.read(told, 32))
        os.write(go, b".")
        for descriptor in (told, tell, wait, go, *ends):
            os.close(descriptor)


def _become(wanted: dict[str, Any], ends: list[int], base: Mapping[str, str], imported: Mapping[str, str]) -> list[str]:
    """Take on what the asker wanted; a fork of this process stays behind for the programs that this one starts."""
    for target, end in enumerate(ends):
        os.dup2(end, target)
    os.closerange(3, 1024)
    os.chdir(wanted["cwd"])
    os.environ.clear()
    os.environ.update({**imported, **wanted["environment"]})
    for number in set(wanted["ignored"]) - {signal.SIGPIPE, signal.SIGXFSZ}:
        signal.signal(number, signal.SIG_IGN)
    if os.environ.get("PYTHONWARNINGS") == "ignore":
        warnings.simplefilter("ignore")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        ours.close()
        nowhere = os.open(os.devnull, os.O_RDWR)
        for target in range(3):
            os.dup2(nowhere, target)
        os.close(nowhere)
        return _serve(theirs, base, imported)
    theirs.close()
    subprocess._fork_exec = Forker(base, ours)  # type: ignore[attr-defined]
    _name(wanted["words"])
    return list(wanted["words"])


def _name(words: Sequence[str]) -> None:
    """What /proc/PID/cmdline says."""
    begin, end = (int(x) for x in Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45:47])
    line = b"".join(word.encode() + b"\0" for word in words)[: end - begin - 1]
    ctypes.memmove(begin, line.ljust(end - begin, b"\0"), end - begin)


def _run(words: list[str]) -> None:
    program = _program(words)
    assert program
    name, sys.argv = program[0], list(program[1])
    if "-u" in words[:2]:
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)  # type: ignore[union-attr]
    if name in MODULES:
        sys.path[0] = os.getcwd()
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(name).resolve().parent)
        runpy.run_path(os.path.abspath(name), run_name="__main__")


if __name__ == "__main__":
    base = {name: value for name, value in os.environ.items() if name != "TORCH_CPP_LOG_LEVEL"}
    sys.path[0] = str(ROOT)
    for module in IMPORTED:
        importlib.import_module(module)
    if len(os.listdir("/proc/self/task")) > 1:
        sys.exit("an import has started a thread: this process cannot be forked")
    gc.collect()
    gc.freeze()  # the collector writes into no page that forks share
    imported = {name: value for name, value in os.environ.items() if base.get(name) != value}
    imported.pop("TORCH_CPP_LOG_LEVEL", None)
    asker = socket.socket(fileno=int(sys.argv[1])) if len(sys.argv) > 1 else sys.exit()
    _run(_serve(asker, base, imported))
