"""One program at a time writes into a folder; whoever else comes is told who does, and stale claims hold nobody up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.io import claims
from configs.io.claims import FILE, claim, in_use, release
from tests.support.runs import ROOT

CLAIM = "from pathlib import Path; from configs.io.claims import claim; import sys, time; "
HOLD = CLAIM + "claim(Path(sys.argv[1])); print('mine', flush=True); time.sleep(600)"
RACE = CLAIM + "sys.stdin.read(1); claim(Path(sys.argv[1])); print('mine', flush=True); sys.stdin.read()"


def started(code: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has claimed tmp_path."""
    process = started(HOLD, tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "mine\n"
    yield process
    process.kill()
    process.communicate()


def written(folder: Path, **changes: Any) -> dict[str, Any]:
    """The claim there, changed."""
    values = json.loads((folder / FILE).read_text()) | changes
    (folder / FILE).write_text(json.dumps(values))
    return values


def assert_mine(folder: Path) -> None:
    assert json.loads((folder / FILE).read_text())["process"] == os.getpid()


def test_a_second_program_is_told_who_is_there(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    said = rf"in use by process {holder.pid} on {os.uname().nodename} since 20.*kill {holder.pid}.*another name"
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(ValueError, match=said):
        claim(tmp_path)
    release(tmp_path)
    assert (tmp_path / FILE).read_bytes() == before, "only its own claim is given up"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_dead_process_left_is_taken_over(
    number: signal.Signals, tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    holder.send_signal(number)
    holder.wait()
    claim(tmp_path)
    assert_mine(tmp_path)
    release(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_zombie_is_dead(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    claim(tmp_path)
    assert_mine(tmp_path)
    release(tmp_path)


def test_a_number_that_was_given_to_another_process(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    """Alive, but it began at another time than the claim's process."""
    written(tmp_path, began="1")
    claim(tmp_path)
    assert_mine(tmp_path)


def test_another_machines_claim_stands(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    written(tmp_path, host="far-away", process=1)
    holder.kill()
    said = rf"process 1 on far-away since .*if it has ended, delete {tmp_path / FILE}"
    with pytest.raises(ValueError, match=said):
        claim(tmp_path)
    (tmp_path / FILE).unlink()
    claim(tmp_path)


def test_a_containers_process_cannot_be_seen(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    """The same name of the machine, other numbers of processes."""
    written(tmp_path, processes="pid:[1]", process=4_000_000)
    with pytest.raises(ValueError, match="if it has ended, delete"):
        claim(tmp_path)


def test_a_machine_that_was_started_anew(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    written(tmp_path, boot="another", processes="pid:[1]")
    claim(tmp_path)
    assert_mine(tmp_path)


def test_a_slurm_job_that_is_started_again_elsewhere(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    written(tmp_path, host="far-away", slurm_job="7", slurm_restart=1)
    assert in_use(tmp_path, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}) is None
    for other in ({"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "2"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}):
        assert "far-away" in str(in_use(tmp_path, other))
    written(tmp_path, host=os.uname().nodename)
    assert "kill" in str(in_use(tmp_path, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"})), "it is seen to live"


@pytest.mark.parametrize(
    ("code", "out", "error", "ended"),
    [
        (1, "", "slurm_load_jobs error: Invalid job id specified", True),
        (0, "", "", True),
        (0, "7 PENDING", "", True),  # of a node that was lost: it waits to be started again
        (0, "8 RUNNING\n9 RUNNING", "", True),  # other tasks of its array
        (0, "7 RUNNING", "", False),
        (0, "7 COMPLETING", "", False),
        (1, "", "slurm_load_jobs error: Unable to contact slurm controller", False),
    ],
)
def test_the_claim_of_a_job_that_has_ended(
    code: int, out: str, error: str, ended: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chain of jobs: the one before was killed at its time limit, or lost its node, and left its claim."""

    def squeue(words: list[str], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert (words[0], words[words.index("--job") + 1]) == ("squeue", "7")
        assert "SQUEUE_STATES" not in env, "a user's own filter would hide jobs that run"
        return subprocess.CompletedProcess(words, code, out, error)

    monkeypatch.setattr(subprocess, "run", squeue)
    monkeypatch.setenv("SQUEUE_STATES", "PENDING")
    claim(tmp_path)
    written(tmp_path, host="far-away", slurm_job="7", slurm_cluster="faroe")
    mine = {"SLURM_JOB_ID": "10", "SLURM_CLUSTER_NAME": "faroe"}
    assert (in_use(tmp_path, mine) is None) == ended
    for other in ({}, {**mine, "SLURM_CLUSTER_NAME": "shetland"}):  # where that number is nobody's, or another job's
        assert "far-away" in str(in_use(tmp_path, other))
    with monkeypatch.context() as context:
        context.setattr(os, "getuid", lambda: -1)
        assert "far-away" in str(in_use(tmp_path, mine)), "SLURM may not show the job of another user"
    written(tmp_path, slurm_job=None, slurm_cluster=None)
    assert "far-away" in str(in_use(tmp_path, {})), "no job, and nobody to ask"


def test_a_claim_that_another_machine_takes_over_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two jobs find the claim of one that has ended; whoever is second leaves the first one's alone."""
    claim(tmp_path)
    written(tmp_path, host="far-away")

    def quicker(folder: Path) -> None:
        written(folder, host="as-far-away", process=1)

    monkeypatch.setattr(claims, "in_use", quicker)
    with pytest.raises(ValueError, match="another program has just begun in it"):
        claim(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert json.loads((tmp_path / FILE).read_text())["host"] == "as-far-away"


def test_no_squeue_is_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container, say."""
    monkeypatch.setenv("PATH", str(tmp_path))
    claim(tmp_path)
    written(tmp_path, host="far-away", slurm_job="7", slurm_cluster="faroe")
    assert "far-away" in str(in_use(tmp_path, {"SLURM_JOB_ID": "10", "SLURM_CLUSTER_NAME": "faroe"}))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"[" * 100_000, b'{"host": "a"}', b"\xff", b"null"])
def test_what_cannot_be_read_is_no_claim_to_take_over(content: bytes, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(ValueError, match=r"in_use.json cannot be read.*delete that file"):
        claim(tmp_path)


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_that_begin_at_once_one_gets_it(stale: bool, tmp_path: Path) -> None:
    if stale:
        dead = started(HOLD, tmp_path)
        assert dead.stdout is not None
        dead.stdout.readline()
        dead.kill()
        dead.communicate()
    racers = [started(RACE, tmp_path) for _ in range(8)]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("x")
        racer.stdin.flush()
    said = [racer.stdout.readline() for racer in racers if racer.stdout is not None]  # who has it holds it until then
    for racer in racers:
        racer.communicate()
    assert sorted(said) == [""] * 7 + ["mine\n"]


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    claim(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_folder_that_cannot_be_written() -> None:
    with pytest.raises(ValueError, match=r"/proc/runs/x cannot be written \(.*\); choose another folder"):
        claim(Path("/proc/runs/x"))
