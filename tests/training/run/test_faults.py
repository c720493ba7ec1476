"""Faults of a run, each injected into real processes on the tiny demo: what is said, the exit code, nothing left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import ROOT, command, environment, metrics, timeless
from tests.training.run.test_leaving import processes_of, wait_until

pytestmark = pytest.mark.alone

FOREVER = ["--steps", "100000", "--checkpoint.every", "2", "--eval.questions", "2"]
NAME = "grpo-minillm"

# A reward of zeros that waits in step 2 of the first start, so that a signal is sure to find the run in it.
PAUSING = """
import time
from pathlib import Path

mark, go, calls = Path({mark!r}), Path({mark!r} + ".go"), []


def nothing_in_step_2_at_once(inputs):
    calls.append(1)
    if len(calls) == 2 and not mark.exists():
        mark.touch()
        while not go.exists():
            time.sleep(0.01)
    return [0.0] * len(inputs.texts_B)
"""


@contextmanager
def running(
    folder: Path, cache: Path, *arguments: str, ranks: int | None = None, **variables: str
) -> Iterator[subprocess.Popen[bytes]]:
    """The tiny demo in the background, its output in folder/log; whatever is left at the end is killed."""
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            command(folder, cache, *arguments, ranks=ranks), cwd=ROOT, env=environment() | variables, stdout=log,
            stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        for pid in processes_of(folder):
            os.kill(pid, signal.SIGKILL)
        process.wait()


def steps_done(folder: Path) -> int:
    path = folder / NAME / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def said(folder: Path) -> str:
    return (folder / "log").read_text(errors="replace")


def wait_for(
    condition: Callable[[], object], folder: Path, process: subprocess.Popen[bytes], seconds: float = 600
) -> None:
    """Until `condition` holds; fails with the log where it does not, or where the run ends first."""
    assert wait_until(lambda: condition() or process.poll() is not None, seconds), said(folder)[-3000:]
    assert condition(), said(folder)[-3000:]


def ranks_of(folder: Path) -> list[int]:
    """Process ids of the trainer's ranks, in order."""
    found = {}
    for pid in processes_of(folder):
        command_line = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
        if "training/main.py" in command_line and "deepspeed" not in command_line:
            variables = dict(x.split("=", 1) for x in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in x)
            found[int(variables["RANK"])] = pid
    return [found[rank] for rank in sorted(found)]


def starts(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / NAME / "summary.json").read_text())["starts"]


def all_gone(folder: Path, seconds: float = 120) -> bool:
    return wait_until(lambda: not processes_of(folder), seconds)


def last_end(folder: Path) -> dict[str, Any]:
    """What starts.jsonl says of the last start's end."""
    return json.loads((folder / NAME / "starts.jsonl").read_text().splitlines()[-1])


def test_ranks_that_are_stopped_or_killed(tmp_path: Path, demo_cache: Path) -> None:
    """Two starts of one run. A rank that is stopped is named within the time-out; one that is killed, at once."""
    limits = ["--stuck_timeout_s", "10", "--teacher.timeout_s", "9"]
    with running(tmp_path, demo_cache, *FOREVER, *limits, ranks=2) as process:
        wait_for(lambda: steps_done(tmp_path) >= 3, tmp_path, process)
        stopped = ranks_of(tmp_path)[1]
        os.kill(stopped, signal.SIGSTOP)
        wait_for(lambda: "rank 1 has not arrived" in said(tmp_path), tmp_path, process, 240)
        line = next(line for line in said(tmp_path).splitlines() if "rank 1 has not arrived" in line)
        stuck = re.search(
            r"rank 0 is stuck in phase (sample|reference|teacher|update|checkpoint) of step \d+ for (\d+) s", line
        )
        assert stuck is not None, line
        assert int(stuck[2]) >= 10, "and no earlier"
        wait_for(lambda: "Killing subprocess" in said(tmp_path), tmp_path, process)
        os.kill(stopped, signal.SIGCONT)  # or DeepSpeed's launcher waits 30 s for it before it kills it
        assert process.wait(400) == 75, "the run has got on, so a new start is worth it"
        assert all_gone(tmp_path)
    end = last_end(tmp_path)
    assert (end["event"], end["exit_code"]) == ("end", 75)
    assert "rank 1 has not arrived" in end["reason"]

    done = steps_done(tmp_path)
    with running(tmp_path, demo_cache, *FOREVER, ranks=2) as process:
        wait_for(lambda: steps_done(tmp_path) >= done + 2, tmp_path, process)
        os.kill(ranks_of(tmp_path)[1], signal.SIGKILL)
        code = process.wait(400)
        assert code not in (0, 2), "not a success, not a mistake in the input"
        assert all_gone(tmp_path)
    end = last_end(tmp_path)
    assert re.match(r"rank 0 lost its connection in phase \w+ of step \d+: rank 1 has not arrived", end["reason"])
    assert end["reason"].split(":")[0] in "".join(said(tmp_path).splitlines()[-12:]), "the reason is in the last lines"
    rows = [json.loads(line) for line in (tmp_path / NAME / "starts.jsonl").read_text().splitlines()]
    second = [row for row in rows if row["event"] == "start"][1]
    assert second["from_step"] % 2 == 0, "it went on from a checkpoint"
    assert second["from_step"] >= 2


def test_a_lost_teacher(tmp_path: Path, demo_cache: Path) -> None:
    """Its server is killed: the ranks wait as long as they may, leave the step, write a checkpoint and ask to be
    started again."""
    patience = ["--teacher.timeout_s", "6", "--stuck_timeout_s", "90", "--checkpoint.every", "100000"]
    with running(tmp_path, demo_cache, *FOREVER, *patience, ranks=2) as process:
        wait_for(lambda: steps_done(tmp_path) >= 2, tmp_path, process)
        for pid in processes_of(tmp_path):
            if "serve_teacher.py" in Path(f"/proc/{pid}/cmdline").read_text():
                os.kill(pid, signal.SIGKILL)
        assert process.wait(400) == 75
        assert all_gone(tmp_path)
    assert last_end(tmp_path)["exit_code"] == 75
    assert "run the same command again" in last_end(tmp_path)["reason"]
    assert (tmp_path / NAME / "checkpoints" / "latest").read_text() == f"step-{steps_done(tmp_path):06d}"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """The run's folder on a file system of 40 MB."""
    folder = tmp_path / NAME
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)], capture_output=True)
    if done.returncode != 0:
        pytest.skip("a file system of its own cannot be mounted here (needs root)")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """A file that leaves no byte."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as out, contextlib.suppress(OSError):
        for size in (1 << 16, 1):
            with contextlib.suppress(OSError):
                while True:
                    out.write(b"x" * size)
    return path


def test_a_full_disk(small_disk: Path, tmp_path: Path, demo_cache: Path) -> None:
    """A run that goes on without a checkpoint has every line when there is room again; one that stops says why."""
    with running(tmp_path, demo_cache, *FOREVER, "--checkpoint.on_error", "continue") as process:
        latest = small_disk / "checkpoints" / "latest"
        wait_for(latest.is_file, tmp_path, process)
        filler = fill(small_disk)
        wait_for(
            lambda: (
                said(tmp_path).count("the run goes on without it") >= 2
                and "metrics.jsonl cannot be written" in said(tmp_path)  # its last page has room for some lines
            ),
            tmp_path,
            process,
        )
        kept = latest.read_text()
        assert (small_disk / "checkpoints" / kept / "manifest.json").is_file()
        assert "No space left" in said(tmp_path)
        filler.unlink()
        wait_for(lambda: latest.read_text() != kept, tmp_path, process)
        process.terminate()
        assert process.wait(400) == 75
    done = int(latest.read_text().removeprefix("step-"))
    assert [row["step"] for row in metrics(small_disk)] == list(range(1, done + 1))
    assert done >= 6, "two checkpoints were left out"

    with running(tmp_path, demo_cache, *FOREVER) as process:
        wait_for(lambda: int(latest.read_text().removeprefix("step-")) > done, tmp_path, process)
        filler = fill(small_disk)
        assert process.wait(400) == 1
        assert all_gone(tmp_path)
    assert re.search(r"could not be written|No space left", said(tmp_path).splitlines()[-1])
    kept = small_disk / "checkpoints" / latest.read_text()
    manifest = json.loads((kept / "manifest.json").read_text())
    assert {name: (kept / name).stat().st_size for name in manifest["files"]} == {
        name: entry["size"] for name, entry in manifest["files"].items()
    }


def test_a_signal_and_the_end_of_the_time_lose_nothing(finished_run: Path, tmp_path: Path, demo_cache: Path) -> None:
    """USR1 in the middle of a step: it is left, and the next start takes it as an unbroken run does; that start has a
    limited time, and ends by itself before it is over. Last here, when the other files of `make test` are through."""
    in_step_2 = tmp_path / "in-step-2"
    (tmp_path / "pausing.py").write_text(PAUSING.format(mark=str(in_step_2)))
    pausing = ["--rewards.custom", f"{tmp_path / 'pausing.py'}:nothing_in_step_2_at_once"]
    begun = time.monotonic()
    with running(tmp_path, demo_cache, *FOREVER, *pausing) as process:
        wait_for(in_step_2.exists, tmp_path, process)
        started_s = time.monotonic() - begun
        os.kill(process.pid, signal.SIGUSR1)
        Path(f"{in_step_2}.go").touch()
        assert process.wait(400) == 75
        assert all_gone(tmp_path)
    (first,) = starts(tmp_path)
    assert (first["reason"], first["exit_code"], first["from_step"]) == ("SIGUSR1", 75, 0)
    assert f"left step {first['step'] + 1} before it changed anything (SIGUSR1)" in said(tmp_path)
    assert (tmp_path / NAME / "checkpoints" / "latest").read_text() == f"step-{first['step']:06d}"

    limit_s = 3 * started_s + 30
    end = time.time() + limit_s
    slurm = {"SLURM_JOB_END_TIME": str(int(end)), "SLURM_RESTART_COUNT": "1", "SLURM_JOB_ID": "17"}
    with running(tmp_path, demo_cache, *FOREVER, *pausing, **slurm) as process:
        assert process.wait(limit_s) == 75
        assert time.time() < end
    second = starts(tmp_path)[1]
    assert (second["reason"], second["exit_code"], second["from_step"]) == ("time limit", 75, first["step"])
    assert (second["slurm_job"], second["slurm_restart_count"]) == ("17", 1)
    rows = timeless(metrics(tmp_path / NAME))
    assert [row["step"] for row in rows] == list(range(1, second["step"] + 1))
    for one, two in zip(timeless(metrics(finished_run)), rows[:3], strict=True):
        for key in one:
            assert two[key] == pytest.approx(one[key], abs=1e-3), key
