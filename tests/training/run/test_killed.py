"""A run that is killed with signal 9 again and again, teacher and all, is in the end the run that was never killed.

PPO with an adaptive KL coefficient and a reference that moves, so that every part of a checkpoint matters; ten prompts
in steps of four, so that most steps cross or touch the end of an epoch; a checkpoint after each step.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.support.forked import Forked, finish_forked
from tests.support.runs import command, metrics, timeless
from tests.training.run.test_leaving import processes_of

PROMPTS, PER_STEP = 10, 4
SETTINGS = ["--algo", "ppo", "--ppo.kl_target", "0.01", "--reference.update", "ema",
            "--loss.kl_coef", "0.05", "--actor.learning_rate", "1e-4", "--eval.questions",
            "4", "--prompts_per_step", str(PER_STEP), "--sampling.group_size", "4", "--checkpoint.every", "1",
            "--checkpoint.samples_every", "1"]  # fmt: skip
MOMENTS = ("start", "step", "write", "write", "step")
"""Kinds of moments, in turns: while it starts or resumes; anywhere in a step; while a checkpoint is written."""


def stand_still_in_a_checkpoint(checkpoints: Path, forced: int) -> None:
    """In the run's process: as soon as so many times something of checkpoints that are not done is forced to disk."""
    fsync, left = os.fsync, iter(range(forced - 1))

    def counted(handle: int) -> None:
        fsync(handle)
        if any(checkpoints.glob("*.partial")) and next(left, None) is None:
            (checkpoints.parent / "stands").touch()
            time.sleep(600)

    os.fsync = counted


class Killed:
    """Starts of one run, each killed at a moment of its kind."""

    def __init__(self, line: list[str], run: Path, seed: int) -> None:
        self._line, self._run, self._random = line, run, random.Random(seed)
        self._output = run.parent / "output.txt"
        self._start_s, self._step_s = 15.0, 0.5  # guesses; they are measured
        self.hits: Counter[str] = Counter()
        """Where the kills came down."""

    def start_and_kill(self, moment: str) -> None:
        """Returns when no process is left. A run that ends before its moment fails the test."""
        before, begun = self._steps(), time.monotonic()
        stands, forced = self._run / "stands", self._random.randint(1, 12)
        stands.unlink(missing_ok=True)
        first = partial(stand_still_in_a_checkpoint, self._run / "checkpoints", forced) if moment == "write" else None
        process = Forked(self._line, self._output, self._output, first)
        try:
            if moment == "start":
                end = begun + self._random.uniform(0.1, 1.0) * self._start_s
                self._wait(process, lambda: time.monotonic() > end or self._steps() > before)
            elif moment == "write":
                self._wait(process, stands.exists)
            else:
                self._wait(process, lambda: self._steps() > before)
                self._start_s = time.monotonic() - begun
                time.sleep(self._random.uniform(0.0, 2 * self._step_s))
            assert process.poll() is None, "the run ended before it was killed: give it more steps"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # trainer and teacher at once
            process.wait()
            for pid in processes_of(self._run.parent):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            while processes_of(self._run.parent):
                time.sleep(0.05)
        self.hits["write" if self._writing() else "start" if self._steps() == before else "step"] += 1
        if rows := metrics_so_far(self._run):
            self._step_s = float(rows[-1]["seconds/total"])

    def _wait(self, process: Forked, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 600
        while not condition():
            assert process.poll() is None, self._output.read_text()[-3000:]
            assert time.monotonic() < end, f"still waiting\n{self._output.read_text()[-3000:]}"
            time.sleep(0.002)

    def _writing(self) -> bool:
        return any((self._run / "checkpoints").glob("*.partial"))

    def _steps(self) -> int:
        return len(metrics_so_far(self._run))


def metrics_so_far(run: Path) -> list[dict[str, float]]:
    """Whole lines of metrics.jsonl; a killed run may leave half of one."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.is_file() else []


def few_prompts(finished_run: Path, folder: Path) -> Path:
    """The demo's first prompts, as a file."""
    path = Path(yaml.safe_load((finished_run / "config.yaml").read_text())["data"]["prompts"])
    (folder / "prompts.jsonl").write_text("".join(path.read_text().splitlines(keepends=True)[:PROMPTS]))
    return folder / "prompts.jsonl"


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("kills", "steps"), [(4, 16), pytest.param(20, 60, marks=pytest.mark.slow)])
def test_killed_runs_end_as_the_unbroken_one(
    kills: int, steps: int, finished_run: Path, demo_cache: Path, tmp_path: Path, train: Callable[..., object]
) -> None:
    (tmp_path / "killed").mkdir()
    settings = [*SETTINGS, "--steps", str(steps), "--data.prompts", str(few_prompts(finished_run, tmp_path))]
    train(tmp_path / "unbroken", *settings)
    line = command(tmp_path / "killed", demo_cache, *settings)
    run, unbroken = (tmp_path / name / "ppo-minillm" for name in ("killed", "unbroken"))
    killed = Killed(line, run, seed=kills)
    moments = [MOMENTS[(kill + 2) % len(MOMENTS)] for kill in range(kills)]
    for moment in moments:
        killed.start_and_kill(moment)
    print(f"\n{kills} kills: {dict(killed.hits)}")
    assert killed.hits["write"] >= moments.count("write") > 0
    finish_forked(line, timeout=1500)

    rows = metrics(run)
    assert [row["step"] for row in rows] == list(range(1, steps + 1)), "no step twice, none missing"
    assert timeless(rows) == timeless(metrics(unbroken))
    assert len({row["ppo/kl_coef"] for row in rows}) > steps // 2, "the coefficient moves, so it has to be saved"
    assert (run / "samples.jsonl").read_bytes() == (unbroken / "samples.jsonl").read_bytes()
    ours, theirs = (load_file(path / "export" / "model.safetensors") for path in (run, unbroken))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    asked = [json.loads(sample)["prompt"] for sample in (run / "samples.jsonl").read_text().splitlines()]
    assert len(asked) == steps * PER_STEP
    for epoch in range(len(asked) // PROMPTS):
        once = asked[epoch * PROMPTS : (epoch + 1) * PROMPTS]
        assert len(set(once)) == PROMPTS, f"epoch {epoch} asks each prompt once"
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"latest", f"step-{steps - 1:06d}", f"step-{steps:06d}"}, "nothing half-written stays, none damaged"
    assert "WARNING checkpoint" not in (tmp_path / "killed" / "output.txt").read_text(), "a kill damages none"
