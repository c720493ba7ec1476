"""Two starts in one run folder: the second is told who is there, and the first one's files stay as they are."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.support.forked import Forked, finish_forked
from tests.support.runs import ROOT, TINY, metrics
from tests.support.teacher_servers import SECRET
from tests.training.run.test_faults import FOREVER, NAME, running, steps_done, wait_for
from tests.training.run.test_leaving import wait_until


def test_the_second_start_is_refused(
    tmp_path: Path, demo_cache: Path, demo_teacher: tuple[str, ...], train: Callable[..., CompletedProcess[str]]
) -> None:
    with running(tmp_path, demo_cache, *demo_teacher, *FOREVER, GRPO_KD_TEACHER_SECRET=SECRET) as first:
        wait_for(lambda: steps_done(tmp_path) >= 3, tmp_path, first)
        done = train(tmp_path, *FOREVER, code=2)
        (line,) = (line for line in done.stderr.splitlines() if line.startswith("error"))
        assert re.search(rf"{NAME} is in use by process {first.pid} on \S+ since 20", line)
        assert "Traceback" not in done.stderr
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        assert [row["step"] for row in metrics(tmp_path / NAME)] == list(range(1, steps_done(tmp_path) + 1))
    steps = (steps_done(tmp_path) // 2 + 1) * 2
    train(tmp_path, *FOREVER, "--steps", str(steps))
    assert [row["step"] for row in metrics(tmp_path / NAME)] == list(range(1, steps + 1))
    assert not (tmp_path / NAME / "in_use.json").exists()


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_stages_0_and_1_do_the_same(stage: str, tmp_path: Path, demo_cache: Path) -> None:
    line = [sys.executable, str(ROOT / "training" / f"{stage}.py"), *TINY, "--runs_dir", str(tmp_path)]
    line += ["--cache_dir", str(demo_cache), "--sft.steps", "100000", "--checkpoint.every", "1000"]
    line += ["--sft.answers", "data"]
    first = Forked(line, tmp_path / "log", tmp_path / "log")
    try:
        assert wait_until((tmp_path / stage / "metrics.jsonl").is_file, 400)
        done = finish_forked(line, code=2)
        assert f"{stage} is in use by process {first.pid} on" in done.stderr.splitlines()[-1]
        first.terminate()
        assert first.wait(200) == 75
        assert not (tmp_path / stage / "in_use.json").exists()
    finally:
        first.kill()
        first.wait()
