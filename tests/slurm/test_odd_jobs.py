"""What a site or a user may do otherwise than slurm/ does, on a real SLURM; the programs only say who they are."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, run, until
from tests.slurm.desk import Desk
from tests.support.runs import ROOT

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
TRAINER = """
import os, signal, sys, time
rank = os.environ["RANK"]
if "waits" in sys.argv:
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(4))
    print("waiting", flush=True)
    time.sleep(100)
time.sleep(4 * (rank == "0"))
print("rank", rank, "of", os.environ["WORLD_SIZE"], "has written its report", *sys.argv[1:], flush=True)
sys.exit(3 * ("fails" in sys.argv and rank == "1"))
"""
TEACHER = """
import sys
with open(sys.argv[sys.argv.index("--address_file") + 1], "w") as file:
    file.write("10.0.0.1:5\\n")
sys.stdin.read()
"""
TASK = """
import os, sys
first = "SLURM_RESTART_COUNT" not in os.environ
print("task", os.environ["SLURM_ARRAY_TASK_ID"], "anew" * (not first), flush=True)
sys.exit(75 * (first and os.environ["SLURM_ARRAY_TASK_ID"] == "1"))
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts, with programs that need no model. The run's name is a pattern and has a comma."""
    folder = tmp_path_factory.mktemp("repository") / "with spaces"
    shutil.copytree(ROOT / "slurm", folder / "slurm")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    programs = {"training/main.py": TRAINER, "eval/run_experiment.py": TASK}
    programs["inference/serve_teacher.py"] = TEACHER
    programs["training/run/job.py"] = f"print({str(folder / 'runs' / 'a, [1]')!r}, 'a, [1]', 2, sep=chr(10))"
    for name, text in programs.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "slurm" / "site.env").write_text(
        f"""export PATH={Path(sys.executable).parent}:/usr/bin:/bin SLURM_WAIT=1
        GRPO_KD_TIME=5 GRPO_KD_GPUS_PER_NODE=0 GRPO_KD_RANKS_PER_NODE=2 GRPO_KD_CPUS_PER_RANK=1 GRPO_KD_MEM_PER_NODE=1G
        """
    )
    return folder


def ended(cluster: Cluster, repository: Path, command: str, variables: str = "", task: str = "") -> tuple[str, str]:
    """The state in which a submitted job ends, and its log."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_JOB", "GRPO_KD"))}
    line = ["bash", "-c", f"{variables} {command}"]
    done = subprocess.run(line, cwd=repository, env=env, capture_output=True, text=True, timeout=100, check=True)
    job = done.stdout.strip()
    return cluster.wait_for(job + task, *ENDED, seconds=60), "".join(
        log.read_text() for log in sorted(repository.glob(f"slurm-*{job}*.out"))
    )


def test_a_job_is_its_own_wherever_it_is_submitted(desk: Desk, repository: Path) -> None:
    """From within another job, without the user's environment, where SLURM ends a step soon after its first task."""
    submit = "salloc -Q -N1 -n1 --mem-per-cpu=200 srun --mem-per-cpu=200 env {} bash slurm/submit.sh stage2_grpo"
    state, log = ended(desk.cluster, repository, submit.format("SBATCH=--export=NONE"))
    assert state == "COMPLETED", log
    state, log = ended(desk.cluster, repository, submit.format("SLURM_HET_SIZE=2"))
    assert state == "COMPLETED", log
    for rank in (0, 1):
        assert f"rank {rank} of 2 has written its report" in log


def test_a_batch_script_of_ones_own(desk: Desk, repository: Path) -> None:
    """With --ntasks; and with srun before ours, in a step that holds the whole job."""
    (repository / "own.sh").write_text(
        "#!/bin/bash\nbash slurm/run_stage2_grpo.sh; srun -N1 -n1 bash slurm/run_stage2_grpo.sh\n"
    )
    state, log = ended(desk.cluster, repository, "sbatch --parsable -N2 --ntasks=4 --mem=1G own.sh")
    assert state == "COMPLETED", log
    assert "rank 3 of 4 has written its report" in log
    assert "rank 1 of 2 has written its report" in log


def test_teacher_and_failed_rank_are_found_whatever_the_run_is_called(desk: Desk, repository: Path) -> None:
    variables = "GRPO_KD_GRACE_S=1 GRPO_KD_TEACHER_NODES=1 GRPO_KD_TEACHER_RANKS_PER_NODE=2"
    state, log = ended(desk.cluster, repository, "bash slurm/submit.sh stage2_grpo fails", variables)
    assert state == "FAILED", log
    assert "rank 1 of 2 has written its report --algo grpo fails --teacher.address 10.0.0.1:5\n" in log
    assert "a rank has failed (rank 1 on node0: exit code 3), and others are still there" in log


def test_a_signal_to_the_batch_script_alone_reaches_the_ranks(desk: Desk, repository: Path) -> None:
    job = run("bash", str(repository / "slurm" / "submit.sh"), "stage2_grpo", "waits").strip()
    log = repository / f"slurm-grpo-kd-grpo-{job}.out"
    until(lambda: log.is_file() and log.read_text().count("waiting") == 2, "two ranks")
    run("scancel", "--batch", "--signal=TERM", job)
    assert desk.cluster.wait_for(job, *ENDED, seconds=60) == "FAILED"
    assert "student component ended with exit code 4" in log.read_text()


def test_a_task_of_an_array_starts_again_alone(desk: Desk, repository: Path) -> None:
    """The last one has the array's number, by which SLURM would start all of them again."""
    command = "sbatch --parsable --array=0-1 -N1 --mem=200M slurm/run_ablation.sh"
    state, log = ended(desk.cluster, repository, command, task="_1")
    assert state == "COMPLETED", log
    assert sorted(line for line in log.splitlines() if line.startswith("task")) == ["task 0 ", "task 1 ", "task 1 anew"]
