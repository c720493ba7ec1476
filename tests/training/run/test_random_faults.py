"""Runs that meet one fault after the other, whatever and whenever: in the end each is the run that met none.

    GRPO_KD_FAULT_MINUTES=30 GRPO_KD_FAULT_SEED=7 python -m pytest -s -m slow tests/training/run/test_random_faults.py

PPO on the tiny demo with a checkpoint after each step; its folder is on a small file system, its teacher a server of
its own.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.support.runs import ROOT, command, environment, finish, metrics, timeless
from tests.support.teacher_servers import SECRET, SERVER, wait_ready
from tests.training.run.test_faults import fill
from tests.training.run.test_killed import SETTINGS, few_prompts, metrics_so_far
from tests.training.run.test_leaving import processes_of

STEPS = 8
MINUTES = float(os.environ.get("GRPO_KD_FAULT_MINUTES", "5"))
SEED = int(os.environ.get("GRPO_KD_FAULT_SEED", str(int(time.time()))))
STOPPED = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGHUP: 75, signal.SIGINT: 130}
NAME = "ppo-minillm"


class Teacher:
    """A server that is killed and started again at the same place."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.address, self._log = folder / "address", folder / "teacher.log"
        line = [sys.executable, str(SERVER), "--path", str(model), "--tensor_parallel", "1"]
        self._line = [*line, "--address_file", str(self.address)]
        self.start()

    def start(self) -> None:
        self.address.unlink(missing_ok=True)
        secret = environment() | {"GRPO_KD_TEACHER_SECRET": SECRET}
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(self._line, env=secret, stderr=log, stdout=log)

    def ready(self) -> None:
        wait_ready(self.process, self.address, self._log)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Trial:
    """One run, start after start, until it is finished."""

    def __init__(self, line: list[str], run: Path, teacher: Teacher, rng: random.Random) -> None:
        self._line, self._run, self._teacher, self._random = line, run, teacher, rng
        self._start_s, self._step_s = 20.0, 1.0
        self.met: Counter[str] = Counter()
        self.starts = 0
        self.expected: set[int] = set()
        """Exit codes that the faults of this start allow."""

    def to_the_end(self) -> None:
        """Returns when the run says that it is finished."""
        while True:
            code = self._one_start()
            assert code in self.expected, f"exit {code}, not one of {self.expected}\n{self._said()[-3000:]}"
            if code == 0:
                return

    def _one_start(self) -> int:
        self.starts += 1
        assert self.starts < 20 * STEPS, "it never gets on"
        self.expected = {0}
        before, begun = len(metrics_so_far(self._run)), time.monotonic()
        with (self._run.parent / "output.txt").open("ab") as output:
            process = subprocess.Popen(
                self._line, cwd=ROOT, env=environment() | {"GRPO_KD_TEACHER_SECRET": SECRET}, stdout=output,
                stderr=output, start_new_session=True,
            )  # fmt: skip
        while process.poll() is None:
            if self._random.random() < 0.3:
                self._sleep(process, self._random.uniform(0, self._start_s))
            else:
                seen = len(metrics_so_far(self._run))
                while process.poll() is None and len(metrics_so_far(self._run)) == seen:
                    assert time.monotonic() - begun < 600, self._said()[-3000:]
                    time.sleep(0.01)
                self._start_s = min(self._start_s, time.monotonic() - begun) if seen == before else self._start_s
                self._sleep(process, self._random.uniform(0, 2 * self._step_s))
            if process.poll() is None:
                fault = self._random.choice(FAULTS)
                fault(self, process)
                self.met[fault.__name__] += 1
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        while left := processes_of(self._run):  # none of a trainer's own: the teacher's server has another folder
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        return process.returncode

    def _sleep(self, process: subprocess.Popen[bytes], seconds: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)

    def _said(self) -> str:
        return (self._run.parent / "output.txt").read_text(errors="replace")

    def killed(self, process: subprocess.Popen[bytes]) -> None:
        self.expected.add(-signal.SIGKILL)
        process.kill()
        process.wait()

    def asked_to_stop(self, process: subprocess.Popen[bytes]) -> None:
        number = self._random.choice(list(STOPPED))
        self.expected |= {STOPPED[number], -number}  # the latter before Python has got as far as our handlers
        process.send_signal(number)
        process.wait(300)

    def stopped_for_a_while(self, process: subprocess.Popen[bytes]) -> None:
        self._pause(process)

    def teacher_stopped_for_a_while(self, process: subprocess.Popen[bytes]) -> None:
        self._pause(self._teacher.process)

    def _pause(self, process: subprocess.Popen[bytes]) -> None:
        process.send_signal(signal.SIGSTOP)
        time.sleep(self._random.uniform(0.1, 6.0))
        process.send_signal(signal.SIGCONT)

    def teacher_started_again(self, process: subprocess.Popen[bytes]) -> None:
        self._teacher.kill()
        gone = time.monotonic()
        time.sleep(self._random.uniform(0.0, 4.0))
        self._teacher.start()
        self._teacher.ready()
        if time.monotonic() - gone > 15.0:  # a busy machine: nearly teacher.timeout_s, as where it is lost
            self.expected |= {75, 1}

    def teacher_lost(self, process: subprocess.Popen[bytes]) -> None:
        """For longer than teacher.timeout_s: the run leaves with a checkpoint, if it asks before the server is back."""
        self.expected |= {75, 1}  # 1: before its first session
        self._teacher.kill()
        self._sleep(process, 60)
        self._teacher.start()
        self._teacher.ready()

    def disk_full(self, process: subprocess.Popen[bytes]) -> None:
        self.expected |= {1, 2, 75}
        filler = fill(self._run)
        self._sleep(process, self._random.uniform(0.5, 5.0))
        filler.unlink()

    def started_twice(self, process: subprocess.Popen[bytes]) -> None:
        """The second is refused, or (before the first has got as far as its claim) the first is; or the first has
        finished and is about to leave."""
        second = subprocess.run(
            self._line, cwd=ROOT, env=environment() | {"GRPO_KD_TEACHER_SECRET": SECRET}, capture_output=True,
            text=True, timeout=300, check=False,
        )  # fmt: skip
        if process.poll() is None and "The run was finished already" not in second.stdout:
            assert second.returncode == 2, second.stderr[-2000:]
            assert re.search(rf"{NAME} is in use by process \d+ on ", second.stderr)
            assert "Traceback" not in second.stderr
        else:
            self.expected |= {2}
            assert second.returncode in (0, 2), second.stderr[-2000:]


FAULTS: list[Callable[[Trial, subprocess.Popen[bytes]], None]] = [
    Trial.killed,
    Trial.killed,
    Trial.asked_to_stop,
    Trial.asked_to_stop,
    Trial.stopped_for_a_while,
    Trial.teacher_stopped_for_a_while,
    Trial.teacher_started_again,
    Trial.teacher_lost,
    Trial.disk_full,
    Trial.started_twice,
]


@contextlib.contextmanager
def disk(folder: Path) -> Iterator[None]:
    """`folder` on a file system of 60 MB of its own."""
    folder.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", str(folder)], capture_output=True)
    if done.returncode != 0:
        pytest.skip("a file system of its own cannot be mounted here (needs root)")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.timeout(60 * MINUTES + 3000)
def test_whatever_happens_it_ends_as_the_run_without_faults(
    finished_run: Path, demo_cache: Path, tmp_path: Path
) -> None:
    rng, until = random.Random(SEED), time.monotonic() + 60 * MINUTES
    settings = [*SETTINGS, "--steps", str(STEPS), "--data.prompts", str(few_prompts(finished_run, tmp_path))]
    finish(command(tmp_path / "unbroken", demo_cache, *settings, "--teacher.tensor_parallel", "1"), timeout=1500)
    unbroken = tmp_path / "unbroken" / NAME
    right = load_file(unbroken / "export" / "model.safetensors")
    (tmp_path / "server").mkdir()
    model = Path(yaml.safe_load((finished_run / "config.yaml").read_text())["teacher"]["path"])
    teacher, met, runs, starts = Teacher(model, tmp_path / "server"), Counter[str](), 0, 0
    teacher.ready()
    try:
        while time.monotonic() < until:
            runs += 1
            folder = tmp_path / f"run-{runs}"
            line = command(folder, demo_cache, *settings, "--teacher.address", str(teacher.address))
            with disk(folder / NAME):
                trial = Trial([*line, "--teacher.timeout_s", "20"], folder / NAME, teacher, rng)
                trial.to_the_end()
                rows = metrics(folder / NAME)
                assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), "none missing, none twice"
                assert timeless(rows) == timeless(metrics(unbroken))
                assert (folder / NAME / "samples.jsonl").read_bytes() == (unbroken / "samples.jsonl").read_bytes()
                ours = load_file(folder / NAME / "export" / "model.safetensors")
                assert ours.keys() == right.keys()
                assert all(torch.equal(ours[name], right[name]) for name in right)
                met, starts = met + trial.met, starts + trial.starts
            print(f"\nseed {SEED}: {runs} runs in {starts} starts, faults {dict(met)}", flush=True)
    finally:
        teacher.kill()
