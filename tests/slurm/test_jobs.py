"""The scripts of slurm/ on a real slurmctld with three nodes: components, chains, signals, lost nodes, arrays."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, run, until
from tests.slurm.desk import FAILED, Desk
from tests.support.runs import ROOT, environment

STEPS = 160
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
SHORT = ["--steps", "2", "--checkpoint.samples_every", "1"]
TRAINER, TEACHER = r"^\S*python \S*training/main\.py", r"^\S*python \S*inference/serve_teacher\.py"


@pytest.fixture(scope="module")
def desk(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, demo_cache: Path) -> Desk:
    """Where the runs of this file are."""

    return Desk(cluster, tmp_path_factory.mktemp("runs"), demo_cache)


@pytest.fixture(autouse=True)
def _look(desk: Desk, request: pytest.FixtureRequest) -> Iterator[None]:
    """When a test has failed: queue, jobs, logs. Jobs that it left are cancelled."""
    yield
    if request.node.stash.get(FAILED, False):
        print(desk.cluster.report(sorted(desk.folder.glob("*.out"))))
        run("scancel", "--user=root", check=False)


def test_student_and_teacher_on_different_nodes(desk: Desk) -> None:
    """A heterogeneous job; its run, called `unbroken`, is what broken ones are compared with."""
    job = desk.submit("stage2_grpo", *LONG, "--name", "unbroken")
    desk.finish(job)
    log = desk.log(job)
    assert f"job {job}: start 1 on node0, teacher on node1" in log
    assert "student after" in log
    assert desk.last_words(job, 1) == f"job {job}: finished"
    assert len(desk.outcome("unbroken")["metrics"]) == STEPS
    assert "on 10.77.0.11:" in (desk.folder / "unbroken" / "job" / "teacher-0.log").read_text()


def test_time_limit_preemption_lost_node_and_lost_teacher_change_nothing(desk: Desk) -> None:
    """One run meets all four, is requeued each time, and ends as the unbroken one, bit for bit."""
    unbroken = desk.outcome("unbroken")
    cluster = desk.cluster
    job = desk.submit("stage2_grpo", *LONG, "--name", "broken", SIGNAL_S=120)

    desk.wait_for_steps("broken", 3)
    with desk.frozen_teacher(job):  # so that the run is there when SLURM looks at time limits, every 30 s
        minutes = desk.minutes_since_start(job)
        run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes + 2}")
        until(lambda: f"job {job}: got USR1" in desk.log(job), "USR1 before the time limit", 90)
    until(lambda: desk.restarts(job) == 1, "requeue", 120)
    run("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    desk.wait_for_restart(job, 1)
    stopped = desk.steps("broken")
    assert 3 <= stopped < STEPS

    desk.wait_for_steps("broken", stopped + 2)
    with desk.frozen_teacher(job):
        urgent = desk.urgent()
        until(lambda: desk.log(job).count("CANCELLED AT") >= 2, "preemption", 60)
    desk.finish(urgent)
    desk.wait_for_restart(job, 2)

    desk.wait_for_steps("broken", desk.steps("broken") + 2)
    node = desk.node_of(job)
    with desk.frozen_teacher(job):  # until it is ended: SLURM may take minutes, and the teacher leaves when it can
        cluster.kill_node(node)
        until(lambda: desk.restarts(job) == 3, "requeue after the node was lost", 120)
        cluster.start_node(node)
        desk.wait_for_restart(job, 3)
        until(lambda: "what is left of the start before" in desk.log(job), "the end of the old teacher", 60)

    desk.wait_for_steps("broken", desk.steps("broken") + 2)
    with desk.frozen_teacher(job) as teacher:
        desk.kill(teacher, TEACHER)
    desk.wait_for_restart(job, 4)
    assert f"teacher component (teacher-0 on {teacher}) ended with exit code 137" in desk.log(job)

    desk.finish(job)
    broken = desk.outcome("broken")
    assert broken["metrics"] == unbroken["metrics"]
    assert broken == unbroken


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
    said = desk.shell("slurm/run_pipeline.sh", *SHORT, "--sft.steps", "2", "--name", "chain", TEACHER_NODES=0)
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
