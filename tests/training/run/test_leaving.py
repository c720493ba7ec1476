"""However a trainer ends, no teacher process stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.forked import Forked
from tests.support.runs import ROOT, command, environment


def processes_of(folder: Path) -> list[int]:
    """Living processes (zombies left out) with `folder` in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "cmdline").read_bytes().decode(errors="replace")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if str(folder) in text and state != "Z":
                found.append(int(entry.name))
    return found


def wait_until(condition: object, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(
    ("number", "ranks", "code", "teachers"),
    [
        (signal.SIGTERM, None, 75, 2),
        (signal.SIGHUP, None, 75, 1),
        (signal.SIGINT, None, 130, 1),
        (signal.SIGKILL, None, -9, 2),
        (signal.SIGTERM, 1, None, 1),
    ],
)
def test_no_teacher_outlives_its_trainer(
    number: signal.Signals, ranks: int | None, code: int | None, teachers: int, tmp_path: Path, demo_cache: Path
) -> None:
    """Whatever the signal, the teacher is told by its closed pipe; with one rank, and with another to tell."""
    run = tmp_path / "grpo-minillm"
    steps = ("--steps", "100000", "--checkpoint.every", "1000", "--teacher.tensor_parallel", str(teachers))
    steps += ("--eval.questions", "2")
    line, quiet = command(tmp_path, demo_cache, *steps, ranks=ranks), subprocess.DEVNULL
    process: subprocess.Popen[bytes] | Forked
    if ranks is None:
        process = Forked(line, tmp_path / "log", tmp_path / "log")
    else:
        process = subprocess.Popen(
            line, cwd=ROOT, env=environment(), stdout=quiet, stderr=quiet, start_new_session=True
        )
    try:
        assert wait_until((run / "metrics.jsonl").is_file, 400), "the run never made a step"
        assert process.poll() is None
        assert len(processes_of(tmp_path)) >= (ranks or 0) + teachers, "a forked trainer has no command line of its own"
        os.kill(process.pid, number)
        exit_code = process.wait(timeout=200)
        assert code is None or exit_code == code
        assert wait_until(lambda: not processes_of(tmp_path), 100), f"left behind: {processes_of(tmp_path)}"
        if code in (75, 130):
            assert (run / "checkpoints" / "latest").is_file(), "stopped with a checkpoint"
    finally:
        process.kill()
        process.wait()
        for pid in processes_of(tmp_path):
            os.kill(pid, signal.SIGKILL)
