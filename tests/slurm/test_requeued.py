"""A run on a real SLURM that is broken off in every way there is, against the same run in one piece."""

from __future__ import annotations

from tests.slurm.cluster import run, until
from tests.slurm.desk import LONG, STEPS, TEACHER, Desk


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
