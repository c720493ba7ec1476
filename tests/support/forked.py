"""Runs of stages 0 to 2 in processes that have the libraries loaded already (multiprocessing's fork server).

Three steps of the tiny demo and their report take two seconds of CPU time; a process of its own spends eight more on
imports, and as many on a teacher of its own. What a test shows of the process itself (its start, signals, the launcher)
it shows with `runs.finish`.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.support.runs import ROOT, environment

_FORKING = multiprocessing.get_context("forkserver")
_FORKING.set_forkserver_preload(["tests.support.preloaded"])


def finish_forked(
    command: Sequence[str], code: int = 0, timeout: float = 900, **variables: str
) -> subprocess.CompletedProcess[str]:
    """As `runs.finish`, of a command line `python training/PROGRAM.py ...`."""
    _, script, *arguments = command
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        process = _FORKING.Process(target=_run, args=(Path(script).stem, arguments, environment() | variables, outputs))
        process.start()
        process.join(timeout)
        ended = process.exitcode
        process.kill()
        process.join()
        said = [file.read_text(encoding="utf-8") if file.is_file() else "" for file in outputs]
    assert ended == code, f"exit {ended}\n{said[0][-3000:]}\n{said[1][-3000:]}"
    return subprocess.CompletedProcess(list(command), code, *said)


def _run(program: str, arguments: list[str], variables: dict[str, str], outputs: Sequence[Path]) -> None:
    """The child: what `python training/PROGRAM.py` does after its imports."""
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(variables)
    multiprocessing.set_start_method("fork", force=True)  # as it is by default
    for descriptor, file in enumerate(outputs, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.argv = [str(ROOT / "training" / f"{program}.py"), *arguments]
    from eval import report
    from training import stage2

    stage2._report = lambda folder: report.main(["--run", str(folder.path)])  # in this process
    try:
        code = importlib.import_module(f"training.{program}").main(arguments)
    except SystemExit as end:
        code = end.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
