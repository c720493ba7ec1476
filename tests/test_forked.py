"""A program that tests fork (tests/support/forked.py) is what it is when it is executed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.forked import SWITCH
from tests.support.runs import ROOT, environment
from tests.training.run.test_leaving import wait_until

pytestmark = pytest.mark.skipif(
    type(subprocess._fork_exec).__name__ != "Forker",  # type: ignore[attr-defined]
    reason="nothing is forked where coverage is measured, CUDA may be in use, or there is no Linux",
)
PROGRAM = [sys.executable, str(ROOT / "tests" / "support" / "started.py")]


def start(switch: str, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    variables = {SWITCH: switch, "RANK": "0", "GRPO_KD_PARENT": str(os.getpid())}
    return subprocess.Popen(
        [*PROGRAM, *arguments], cwd=folder, env=environment() | variables, text=True, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def is_forked(process: subprocess.Popen[str]) -> bool:
    """It has loaded torch without having been told to."""
    return "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()


def group_lives(number: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(number, 0)
        return True
    return False


def test_a_forked_program_is_as_an_executed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPO_KD_GONE", "")
    monkeypatch.delenv("GRPO_KD_GONE")
    told = []
    for switch in ("0", "1"):
        process = start(switch, tmp_path, "--more")
        out, said = process.communicate("to the first", timeout=300)
        told.append((json.loads(out), said, process.returncode))
    executed, forked = told
    assert forked == executed
    first, second, below_said, below_code = executed[0]
    assert first["parent"] is second["parent"] is True
    assert (first["leads"], second["leads"]) == ([True, True], [False, True])
    assert (second["input"], second["variables"], below_said, below_code) == (
        "to the one below",
        ["1", None],
        "said\n",
        7,
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -15), (signal.SIGKILL, -9), (signal.SIGINT, -2)])
def test_it_ends_at_a_signal_and_leaves_nothing(number: signal.Signals, code: int, tmp_path: Path) -> None:
    process = start("1", tmp_path, "--wait")
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    assert json.loads(process.stdout.readline())
    assert is_forked(process)
    os.killpg(process.pid, number)
    assert process.wait(60) == code
    assert wait_until(lambda: not group_lives(process.pid), 60), "what it forked has gone too"
    process.stdout.close()
