"""When a start has to write its last checkpoint, and what is said of starts: the arithmetic, by hand."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from training.starts import Starts
from training.stopping import TimeLimit


class Now:
    """A clock that a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 1000.0
        monkeypatch.setattr(time, "time", lambda: self.seconds)


def test_without_an_end_the_time_is_never_over() -> None:
    limit = TimeLimit(None, {"SLURM_JOB_END_TIME": "soon"})
    limit.took_step(1e9)
    assert not limit.is_over(next_step=True)


def test_one_more_step_and_the_checkpoint_have_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """400 s: 20 are kept free; 1.25 times the checkpoint's 8 s and the longest step's 40 s come on top."""
    now = Now(monkeypatch)
    limit = TimeLimit(400, {})
    for seconds in (40, 20):
        limit.took_step(seconds)
    limit.took_checkpoint(8)
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
