"""When a start has to write its last checkpoint, how it ends, and what is said of it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed import DistStoreError
from tqdm import tqdm

from configs.io.lines import LineFile
from configs.schema import ActorConfig, RunConfig
from inference.client import TeacherLost, TeacherRefused
from training import distributed, stage2
from training.run import launcher
from training.run.checkpoints import CheckpointFailed
from training.run.console import Unfailing
from training.run.run_folder import Progress, RunFolder
from training.run.safe_points import SafePoints, TimeLimit
from training.run.stopping import StopRequest
from training.run.supervisor import Starts, Supervisor, lowered
from training.run.watchdog import Told, Watchdog
from training.student import deepspeed_engine
from training.teacher.api_teacher import ApiRefused

ROOT = Path(__file__).resolve().parents[3]


class Now:
    """A clock that a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 1000.0
        for name in ("time", "monotonic"):
            monkeypatch.setattr(time, name, lambda: self.seconds)


@pytest.mark.parametrize("end", ["soon", "1"])
def test_without_an_end_the_time_is_never_over(end: str) -> None:
    """A terminal multiplexer's shell may know the end of the job that it was started in."""
    limit = TimeLimit(None, {"SLURM_JOB_END_TIME": end})
    limit.step_s = 1e9
    assert not limit.is_over(next_step=True)


def test_one_more_step_and_the_checkpoint_have_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """400 s: 20 are kept free; 1.25 times the checkpoint's 8 s and the longest step's 40 s come on top."""
    now = Now(monkeypatch)
    limit = TimeLimit(400, {})
    limit.step_s, limit.checkpoint_s = 40, 8
    for at, next_step, over in ((1320, True, False), (1321, True, True), (1321, False, False), (1371, False, True)):
        now.seconds = at
        assert limit.is_over(next_step=next_step) == over, at


def test_the_earlier_end_counts_and_a_minute_is_the_most_that_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    now = Now(monkeypatch)
    for limit_s, job_end in ((10_000, 21_000), (20_000, 11_000), (None, 11_000)):
        limit = TimeLimit(limit_s, {"SLURM_JOB_END_TIME": str(job_end)})
        now.seconds = 10_939
        assert not limit.is_over(next_step=True)
        now.seconds = 10_941
        assert limit.is_over(next_step=True)
        now.seconds = 1000


def test_a_clock_that_is_set_does_not_move_the_end_of_a_limit_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = TimeLimit(3600, {})
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 86400)
    assert not limit.is_over(next_step=True)


def test_a_step_takes_as_long_as_its_validation_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is not left: a job whose time ends in it would lose what came behind its last checkpoint."""
    now = Now(monkeypatch)
    points = SafePoints(StopRequest(listen=False), TimeLimit(400, {}))
    points.begin(0)
    now.seconds = 1100
    points.enter("validation")
    now.seconds = 1200
    assert points.after_step(), "200 s are left, 20 of them are kept free, and the next may take 1.25 times 200"
    assert points.reason == "time limit"


def test_a_start_that_said_nothing_was_killed(tmp_path: Path) -> None:
    first = Starts(tmp_path, {"SLURM_RESTART_COUNT": "3", "SLURM_JOB_ID": "8"})
    first.end("too early: nothing has begun", 1)
    first.begin(0, 2)
    with (tmp_path / "starts.jsonl").open("a") as out:
        out.write('{"event": "en')  # killed while it was writing
    second = Starts(tmp_path, {})
    second.begin(4, 1)
    second.end("SIGUSR1", 75, 6)
    second.end("the first reason counts", 1)
    killed, stopped = second.listed()
    assert (killed["from_step"], killed["ranks"], killed["reason"], killed["end"]) == (0, 2, "killed", None)
    assert (killed["slurm_job"], killed["slurm_restart_count"]) == ("8", 3)
    assert (stopped["from_step"], stopped["step"], stopped["reason"], stopped["exit_code"]) == (4, 6, "SIGUSR1", 75)


@pytest.fixture
def supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Supervisor:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the tests keep their own handlers
    return Supervisor(CONFIG, tmp_path, StopRequest())


CONFIG = RunConfig(actor=ActorConfig(micro_batch_tokens=5000))


def ends(supervisor: Supervisor, error: BaseException) -> int:
    def work() -> int:
        raise error

    return supervisor.run(work)


@pytest.mark.parametrize("phase", ["update", "reference"])
def test_memory_that_runs_out_in_a_pass_halves_the_budget_of_the_next_start_once(
    phase: str, supervisor: Supervisor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert lowered(CONFIG, tmp_path) == CONFIG
    supervisor.watch(0).enter(phase)
    assert ends(supervisor, torch.OutOfMemoryError("8 GB asked for")) == 75
    assert lowered(CONFIG, tmp_path).actor.micro_batch_tokens == 2500
    less = RunConfig(actor=ActorConfig(micro_batch_tokens=100))
    assert lowered(less, tmp_path) == less, "what the user has lowered further stays"
    assert ends(supervisor, torch.OutOfMemoryError("8 GB asked for")) == 75, "another rank of the same start"
    again = Supervisor(lowered(CONFIG, tmp_path), tmp_path, StopRequest())
    again.watch(0).enter(phase)
    assert ends(again, torch.OutOfMemoryError("8 GB asked for")) == 1
    assert lowered(CONFIG, tmp_path).actor.micro_batch_tokens == 2500
    assert "8 GB asked for" in caplog.text
    assert "lower actor.micro_batch_tokens" in caplog.text


def test_memory_that_runs_out_in_sampling_is_advice_alone(
    supervisor: Supervisor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    supervisor.watch(0).enter("sample")
    assert ends(supervisor, torch.OutOfMemoryError("8 GB asked for")) == 1
    assert lowered(CONFIG, tmp_path) == CONFIG
    assert "lower sampling.group_size" in caplog.text


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 1, "out of memory"),
        (MemoryError(), 1, "out of memory"),
        (CheckpointFailed("the checkpoint of step 4 could not be written: No space left"), 1, "No space left"),
        (TeacherLost("no teacher for 6 s"), 75, "run the same command again"),
        (ZeroDivisionError("1/0"), 1, "ZeroDivisionError"),
        (
            RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:9866"),
            1,
            "lost its connection at the start",
        ),
        (DistStoreError("Timed out after 9 seconds waiting for clients. 1/2 clients joined."), 1, "has not come"),
        (TeacherRefused("the teacher has another secret (GRPO_KD_TEACHER_SECRET)"), 2, "another secret"),
        (ApiRefused("the endpoint refuses (401): no such key"), 1, "no such key"),
    ],
)
def test_the_exit_code_of_each_way_to_end(
    error: Exception, code: int, words: str, supervisor: Supervisor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    supervisor.starts.begin(3, 1)
    assert ends(supervisor, error) == code
    assert words in caplog.text
    (start,) = supervisor.starts.listed()
    assert start["exit_code"] == code
    assert words in start["reason"]
    shown = [record.exc_info is not None for record in caplog.records]
    assert any(shown) == isinstance(error, ZeroDivisionError), "a trace is for faults of ours alone"


def test_a_teacher_that_refuses_in_the_middle_is_no_mistake_in_the_input(supervisor: Supervisor) -> None:
    supervisor.watch(3)
    assert ends(supervisor, TeacherRefused("host:1 serves another teacher (b) than before (a)")) == 1


def test_a_mistake_in_the_input_goes_through(supervisor: Supervisor) -> None:
    with pytest.raises(SystemExit) as raised:
        ends(supervisor, SystemExit(2))
    assert raised.value.code == 2


def test_lines_wait_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes 5 bytes more and is then full: no half line, and later every line in order."""
    lines, real, room = LineFile(tmp_path / "rows"), os.write, 5
    lines.append("one")

    def write(handle: int, data: bytes) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = real(handle, data[:room])
        room -= taken
        return taken

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", write)
        for text in ("second", "third"):
            with pytest.raises(OSError, match="No space left"):
                lines.append(text)
            assert (tmp_path / "rows").read_text() == "one\n"
    lines.flush()
    assert (tmp_path / "rows").read_text() == "one\nsecond\nthird\n"


@pytest.mark.parametrize("rests", [False, True])
def test_who_is_left_alone_is_not_stuck(rests: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the last collective rank 0 writes a report, or uploads a model, longer than stuck_timeout_s."""
    said: list[str] = []
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    PrefixStore("watchdog", store).set("1", json.dumps(asdict(Told())))
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(store.port))):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    watchdog = Watchdog(1.0, SafePoints(StopRequest(listen=False), TimeLimit(None)), said.append)
    if rests:
        watchdog.rest()
    end = time.monotonic() + (3.0 if rests else 30.0)
    while time.monotonic() < end and not said:
        time.sleep(0.05)
    watchdog.rest()
    assert bool(said) != rests, said


CHILD = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from training.run.launcher import watch_launcher
starter = os.getppid()
watch_launcher(0.05)
open(sys.argv[2], "w").close()
while os.getppid() == starter:
    time.sleep(0.02)
time.sleep(float(sys.argv[3]))
print("alive")
"""
STARTER = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", *sys.argv[1:]])
while not os.path.exists(sys.argv[3]):
    time.sleep(0.02)
"""


@pytest.mark.parametrize(("started_by", "stays"), [("envs/deepspeed/torchrun", True), ("deepspeed.launcher", False)])
def test_only_deepspeeds_launcher_may_not_leave(started_by: str, stays: bool, tmp_path: Path) -> None:
    """An environment is often called deepspeed; what was started in its shell with nohup outlives that."""
    starter, marker = tmp_path / started_by, tmp_path / "marker"
    starter.parent.mkdir(parents=True, exist_ok=True)
    starter.write_text(STARTER)
    seconds = "0.5" if stays else "300"  # behind the starter's end
    line = [sys.executable, str(starter), CHILD, str(ROOT), str(marker), seconds]
    done = subprocess.run(line, check=True, stdout=subprocess.PIPE, timeout=200)  # the child's too
    assert (done.stdout == b"alive\n") == stays


def test_a_signal_that_came_with_the_last_step_is_not_forgotten() -> None:
    """While the last checkpoint is written, say: the evaluation behind it may take longer than the scheduler waits."""
    stop = StopRequest(listen=False)
    stop.defer()
    stop._handle(signal.SIGUSR1, None)
    with pytest.raises(SystemExit) as raised:
        stop.undefer()
    assert raised.value.code == 75


@pytest.mark.parametrize(("status", "said"), [("stopped", True), ("finished", False)])
def test_a_run_that_has_stopped_needs_no_room_for_its_summary(
    status: str, said: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its checkpoint may have taken the last of it: exit code 75 and not 1. One that has finished has to say so."""

    def full(name: str, value: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = RunFolder(tmp_path)
    monkeypatch.setattr(folder, "write_json", full)
    run: Any = SimpleNamespace(config=CONFIG, folder=folder)
    with contextlib.nullcontext() if said else pytest.raises(OSError, match="No space left"):
        stage2._write_summary(run, Progress(step=3), {"status": status})
    assert ("summary.json cannot be written (No space left" in caplog.text) == said


def test_a_log_on_a_full_disk_ends_nothing() -> None:
    full = Path("/dev/full").open("w", buffering=1)  # noqa: SIM115
    with pytest.raises(OSError, match="No space left"):
        list(tqdm(range(3), file=full, mininterval=0))
    stream: Any = Unfailing(full)
    print("a line", file=stream, flush=True)
    assert list(tqdm(range(3), file=stream, mininterval=0)) == [0, 1, 2]
    assert not stream.isatty()
    with contextlib.suppress(OSError):
        full.close()


def test_no_collective_gives_up_before_the_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher may be waited for as long as teacher.timeout_s says; torch's own limit is half an hour."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(launcher, "ensure_launcher_environment", lambda: None)
    monkeypatch.setattr(deepspeed_engine.deepspeed, "init_distributed", lambda **options: found.update(options))
    for stuck_s, seconds in ((7200.0, 14400), (60.0, 1800)):
        deepspeed_engine.start_distributed(stuck_s)
        assert found["timeout"].total_seconds() == seconds
