"""Submitting runs of the tiny demo to the test cluster as a user would, and reading what they left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import NODES, Cluster, run, until
from tests.support.runs import ROOT, TINY, TWO_TEACHER_RANKS, environment, timeless
from tests.support.runs import metrics as read_metrics

STEPS = 60
"""More than a quick machine takes between what is done to the run."""
LONG = [
    "--steps",
    str(STEPS),
    "--checkpoint.every",
    "2",
    "--checkpoint.samples_every",
    "2",
    "--teacher.timeout_s",
    "90",
]
TRAINER, TEACHER = r"^\S*python \S*training/main\.py", r"^\S*python \S*inference/serve_teacher\.py"

SITE = """
: "${GRPO_KD_TIME:=30}" "${GRPO_KD_GPUS_PER_NODE:=0}" "${GRPO_KD_RANKS_PER_NODE:=1}" "${GRPO_KD_CPUS_PER_RANK:=2}"
: "${GRPO_KD_MEM_PER_NODE:=2G}" "${GRPO_KD_TEACHER_NODES:=1}" "${GRPO_KD_TEACHER_RANKS_PER_NODE:=2}"
"""
"""site.env of the test cluster: no GPUs, a component for the teacher. Single jobs override it as users do."""


FAILED = pytest.StashKey[bool]()
"""Set on a test that has failed."""


class Desk:
    """One folder of runs and logs."""

    def __init__(self, cluster: Cluster, folder: Path, cache: Path) -> None:
        self.cluster, self.folder, self.cache = cluster, folder, cache
        (folder / "site.env").write_text(SITE)
        self._own = {"GRPO_KD_SITE": str(folder / "site.env"), "SLURM_CONF": str(cluster.conf)}

    def submit(self, stage: str, *arguments: str, sbatch: str = "", **site: object) -> str:
        """A job through slurm/submit.sh; `site` are GRPO_KD_ variables. Returns its id."""
        return self.shell(f"slurm/submit.sh {stage}", *arguments, sbatch=sbatch, **site).strip()

    def shell(self, script: str, *arguments: str, sbatch: str = "", **site: object) -> str:
        """A script of slurm/, as from a login node; returns its standard output."""
        variables = {f"GRPO_KD_{name}": str(value) for name, value in site.items()}
        output = f"--output={self.folder}/%j.out"
        folders = ["--runs_dir", str(self.folder), "--cache_dir", str(self.cache)]
        done = subprocess.run(
            ["bash", *script.split(), *TINY, *TWO_TEACHER_RANKS, *folders, *arguments],
            cwd=ROOT, text=True, capture_output=True, timeout=120, check=False,
            env=environment() | self._own | {"SBATCH": f"{output} {sbatch}"} | variables,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def log(self, job: str) -> str:
        """Everything that a job has printed."""
        file = self.folder / f"{job}.out"
        return re.sub(r"[^\n]*\r", "", file.read_text(encoding="utf-8", errors="replace")) if file.is_file() else ""

    def finish(self, job: str, state: str = "COMPLETED", seconds: float = 900) -> None:
        """Wait for the end of a job, and be sure that it ended so."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
        assert self.cluster.wait_for(job, *ended, seconds=seconds) == state

    def steps(self, name: str) -> int:
        """Steps that a run has logged."""
        file = self.folder / name / "metrics.jsonl"
        return len(file.read_text().splitlines()) if file.is_file() else 0

    def wait_for_steps(self, name: str, count: int, seconds: float = 900) -> None:
        """Until a run has logged so many steps."""
        until(lambda: self.steps(name) >= count, f"step {count} of {name}", seconds)

    def outcome(self, name: str) -> dict[str, Any]:
        """What a run came to: metrics without timings, samples, weights."""
        run_folder = self.folder / name
        assert json.loads((run_folder / "summary.json").read_text())["status"] == "finished"
        weights = sorted((run_folder / "export").glob("*.safetensors"))
        assert weights
        return {
            "metrics": timeless(read_metrics(run_folder)),
            "samples": (run_folder / "samples.jsonl").read_text(),
            "weights": [file.read_bytes() for file in weights],
        }

    def kill(self, node: str, pattern: str) -> None:
        """SIGKILL to a run's processes on a node."""
        found = self.cluster.processes(node, pattern)
        assert found, f"no {pattern} on {node}"
        self._send(found, signal.SIGKILL)

    @contextlib.contextmanager
    def frozen_teacher(self, job: str) -> Iterator[str]:
        """The teacher's processes stand still meanwhile, so that the run does not end before something happens to it.

        Yields the teacher's node.
        """
        node = self.node_of(job, component=1)
        pids = self.cluster.processes(node, TEACHER)
        assert pids
        self._send(pids, signal.SIGSTOP)
        try:
            yield node
        finally:
            self._send(pids, signal.SIGCONT)

    def _send(self, pids: Sequence[int], number: signal.Signals) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def urgent(self) -> str:
        """A job that needs all nodes whole, and may have them."""
        line = ["-p", "urgent", f"-N{len(NODES)}", "--ntasks-per-node=1", "--cpus-per-task=64", "--output=/dev/null"]
        return run("sbatch", "--parsable", *line, "--wrap=true").strip()

    def minutes_since_start(self, job: str) -> int:
        """Whole minutes that a job has run."""
        hours, minutes, _ = self.cluster.field(job, "RunTime").split(":")
        return int(hours) * 60 + int(minutes)

    def restarts(self, job: str) -> int:
        """How often SLURM has started a job again."""
        return int(self.cluster.field(job, "Restarts") or 0)

    def wait_for_restart(self, job: str, number: int, seconds: float = 300) -> None:
        """Until a job runs again."""
        until(
            lambda: self.restarts(job) == number and self.cluster.state(job) == "RUNNING", f"restart {number}", seconds
        )

    def last_words(self, job: str, lines: int = 4) -> str:
        """The last lines of a job's own log."""
        return "\n".join(self.log(job).strip().splitlines()[-lines:])

    def node_of(self, job: str, component: int = 0) -> str:
        """The first node of a component."""
        shown = run("squeue", "-h", "-j", job, "-o", "%i %N").splitlines()
        names = {line.split()[0]: line.split()[1] for line in shown}
        return names[f"{job}+{component}" if len(names) > 1 else job]
