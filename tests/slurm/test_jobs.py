"""The scripts of slurm/ on a real slurmctld with three nodes: components, chains, lost processes, arrays."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import run, until
from tests.slurm.desk import LONG, TEACHER, TRAINER, Desk
from tests.support.runs import ROOT, environment

SHORT = ["--steps", "2", "--checkpoint.samples_every", "1"]


def test_the_nodes_of_a_job_are_checked(desk: Desk) -> None:
    job = desk.submit("stage2_grpo", "--doctor", "--cluster", "--name", "check", STUDENT_NODES=2, TEACHER_NODES=0)
    desk.finish(job)
    log = desk.log(job)
    assert re.search(r"nodes +pass 2 ranks: 1 on \S+ .*, 1 on ", log)
    assert re.search(r"teacher port +pass every rank reaches 10\.77\.0\.\d+:", log)
    assert "7 passed, 0 failed, 0 skipped" in log


def test_a_dead_trainer_ends_its_teachers_and_the_job_says_why(desk: Desk) -> None:
    """Two replicas: without the first the run goes on; without the trainer nothing does."""
    job = desk.submit(
        "stage2_grpo", *LONG, "--steps", "1000", "--name", "dead", "--teacher.tensor_parallel", "1",
        TEACHER_NODES=2, TEACHER_REPLICAS=2, TEACHER_RANKS_PER_NODE=1,
    )  # fmt: skip
    desk.wait_for_steps("dead", 1)
    desk.kill("node1", TEACHER)
    until(lambda: "1 left" in desk.log(job), "word of the dead replica", 60)
    before = desk.steps("dead")
    desk.wait_for_steps("dead", before + 2)
    desk.kill("node0", TRAINER)
    desk.finish(job, "FAILED", 120)
    assert "student component ended with exit code 137" in desk.last_words(job)
    assert desk.last_words(job, 1) == f"job {job}: the job ends with exit code 137"
    until(lambda: not desk.cluster.processes("node2", TEACHER), "the end of the other replica", 30)


def test_two_student_nodes_are_two_ranks_on_one_node(desk: Desk) -> None:
    """Across nodes the trainer starts its teacher itself; on one node the teacher is cut in two, over two nodes."""
    across = desk.submit("stage2_grpo", *SHORT, "--name", "across", STUDENT_NODES=2, TEACHER_NODES=0)
    desk.finish(across)
    assert f"job {across}: start 1 on node[" in desk.log(across)
    one = desk.submit(
        "stage2_grpo", *SHORT, "--name", "one", RANKS_PER_NODE=2, TEACHER_NODES=2, TEACHER_RANKS_PER_NODE=1
    )
    desk.finish(one)
    first, second = desk.outcome("across"), desk.outcome("one")
    assert first["samples"] == second["samples"]
    for row, other in zip(first["metrics"], second["metrics"], strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-6)  # the teacher may merge the ranks' questions


def test_the_pipeline_runs_through(desk: Desk) -> None:
    said = desk.shell(
        "slurm/run_pipeline.sh", *SHORT, "--sft.steps", "2", "--sft.samples", "1", "--name", "chain", TEACHER_NODES=0
    )
    jobs = said.splitlines()[0].removeprefix("jobs ").partition(":")[0].split()
    assert len(jobs) == 3
    judged = importlib.util.find_spec("euroeval") is not None
    for job in jobs[:2]:
        desk.finish(job)
    desk.finish(jobs[2], "COMPLETED" if judged else "FAILED")  # stage 3 says that EuroEval is missing
    settings = (desk.folder / "chain" / "config.yaml").read_text()
    assert f"path: {desk.folder}/chain-sft/export" in settings
    (scores,) = (desk.folder / "chain" / "eval").glob("held*.json")
    assert str(desk.folder / "chain" / "export") in scores.read_text()


def test_a_failing_stage_1_leaves_nothing_pending(desk: Desk) -> None:
    said = desk.shell("slurm/run_pipeline.sh", *SHORT, "--sft.batch", "100000", "--name", "broken-chain")
    first, *others = said.splitlines()[0].removeprefix("jobs ").partition(":")[0].split()
    desk.finish(first, "FAILED")
    assert "sft.batch = 100000" in desk.log(first)
    assert desk.last_words(first, 1) == f"job {first}: the job ends with exit code 2"
    until(lambda: not run("squeue", "-h", "-o", "%i"), "an empty queue", 60)
    for job in others:
        assert desk.cluster.state(job) == "CANCELLED"


def test_an_array_does_one_run_of_the_ablation_in_each_task(desk: Desk, demo_cache: Path) -> None:
    line = [
        "sbatch", "--parsable", "--array=0-1", f"--output={desk.folder}/%A_%a.out", "--mem=2G", "slurm/run_ablation.sh",
        "--only", "grpo-minillm", "ppo-minillm", "--seeds", "0", "--steps", "1",
        "--runs_dir", str(desk.folder / "ablation"), "--cache_dir", str(demo_cache),
        "--demo_size", "tiny", "--threads", "1", "--eval.questions", "8",
    ]  # fmt: skip
    env = environment() | {"SLURM_CONF": str(desk.cluster.conf)}
    job = subprocess.run(line, cwd=ROOT, env=env, text=True, capture_output=True, check=True).stdout.strip()
    for task in ("0", "1"):
        desk.finish(f"{job}_{task}")
    for variant in ("grpo-minillm", "ppo-minillm"):
        summary = json.loads((desk.folder / "ablation" / f"{variant}-seed0" / "summary.json").read_text())
        assert summary["status"] == "finished"
