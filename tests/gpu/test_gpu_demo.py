"""The tiny demo from end to end on the device: teacher server, student, reference or critic, evaluation, report."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.gpu.device import DEVICE, DRY_RUN, ON_DEVICE, worker_environment
from tests.support.runs import ROOT, TWO_TEACHER_RANKS, command, metrics

pytestmark = ON_DEVICE


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize(("algo", "dtype"), [("grpo", "float32"), ("ppo", "float32"), ("grpo", "bfloat16")])
def test_a_run(algo: str, dtype: str, tmp_path: Path, cache: Path) -> None:
    """Two teacher ranks, as by default: on a machine with one GPU they share it."""
    options = ["--algo", algo, "--student.dtype", dtype, "--teacher.dtype", dtype, "--steps", "3"]
    options += TWO_TEACHER_RANKS
    done = subprocess.run(
        command(tmp_path, cache, *options), cwd=ROOT, env=worker_environment(DEVICE), capture_output=True, text=True,
        timeout=580 if DRY_RUN else 120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    rows = metrics(tmp_path / f"{algo}-minillm")
    assert len(rows) == 3
    assert all(row["skipped"] == 0 for row in rows)
    limit = {"float32": 1e-3, "bfloat16": 0.05}[dtype]
    assert rows[0]["mismatch/mean"] <= limit
    assert (tmp_path / f"{algo}-minillm" / "report.html").is_file()
