"""Programs in processes that have the libraries loaded already (multiprocessing's fork server).

Three steps of the tiny demo and their report take two seconds of CPU time; a process of its own spends eight more on
imports, and as many on a teacher of its own. What a test shows of the process itself (its start, its command line, the
launcher) it shows with `runs.finish` and `teacher_servers.serve`.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from configs.io.lines import LineFile
from tests.support.runs import ROOT, environment, free_port

_FORKING = multiprocessing.get_context("forkserver")
_FORKING.set_forkserver_preload(["tests.support.preloaded"])


class Forked:
    """`python SCRIPT ARGUMENT ...`, with the methods of subprocess.Popen. Leads a session of its own."""

    def __init__(
        self,
        command: Sequence[str],
        stdout: Path,
        stderr: Path,
        first: Callable[[], None] | None = None,
        **variables: str,
    ) -> None:
        """The environment is runs.environment() with `variables`; outputs are appended to the files. `first` is called
        in the process before the script (a function of a module, or a `partial` of one)."""
        _, script, *arguments = command
        given = (Path(script), arguments, environment() | variables, (stdout, stderr), first)
        self._stderr = stderr
        self._process = _FORKING.Process(target=_run, args=given, daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            self.send_signal(signal.SIGABRT)  # where each of its threads is (faulthandler)
            self._process.join(10)
            said = self._stderr.read_text(encoding="utf-8", errors="replace")[-6000:]
            raise AssertionError(f"not ended after {timeout} s; it said:\n{said}")
        return code

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def finish_forked(
    command: Sequence[str], code: int = 0, timeout: float = 900, **variables: str
) -> subprocess.CompletedProcess[str]:
    """As `runs.finish`, of a command line `python SCRIPT ARGUMENT ...`."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        process = Forked(command, *outputs, **variables)
        try:
            ended = process.wait(timeout)
        finally:
            process.kill()
            process.wait()
        said = [file.read_text(encoding="utf-8") if file.is_file() else "" for file in outputs]
    assert ended == code, f"exit {ended}\n{said[0][-3000:]}\n{said[1][-3000:]}"
    return subprocess.CompletedProcess(list(command), code, *said)


def wait_behind_first_line(file: Path) -> None:
    """For `first`: when the program has written the first line of `file`, it waits until FILE.go is there too."""
    append, go = LineFile.append, file.with_suffix(".go")

    def appended(self: LineFile, line: str) -> None:
        append(self, line)
        while self._path == file and not go.exists():
            time.sleep(0.01)

    LineFile.append = appended  # type: ignore[method-assign]


def finish_ranks(program: Sequence[str], world: int, folder: Path, seconds: float, **variables: str) -> None:
    """Run `world` ranks of one program to the end, outputs in folder/rankN.log; one that fails or has not ended in time
    fails the test."""
    shared = variables | {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    logs = [folder / f"rank{rank}.log" for rank in range(world)]
    processes = [
        Forked(program, log, log, **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0] * world, "\n".join(log.read_text(errors="replace")[-2500:] for log in logs)


def _run(
    script: Path,
    arguments: list[str],
    variables: dict[str, str],
    outputs: Sequence[Path],
    first: Callable[[], None] | None,
) -> None:
    """The child: what `python SCRIPT` does after its imports."""
    os.setsid()
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(variables)
    multiprocessing.set_start_method("fork", force=True)  # as it is by default
    for descriptor, file in enumerate(outputs, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    faulthandler.enable(2)
    sys.argv = [str(script), *arguments]
    from eval import report
    from training import stage2

    stage2._report = lambda folder: report.main(["--run", str(folder.path)])  # in this process
    code: object = 1
    try:
        if first is not None:
            first()
        runpy.run_path(str(script), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)
