"""Starting the real programs on the tiny demo, for tests."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--demo_size", "tiny", "--prompts_per_step", "8", "--threads", "1", "--eval.questions", "24"]
TINY += ["--sampling.max_new_tokens", "12", "--teacher.tensor_parallel", "1"]
TWO_TEACHER_RANKS = ("--teacher.tensor_parallel", "2")
"""As by default, where a test is about them: the second rank is a quarter of the CPU time of a short run."""


def environment() -> dict[str, str]:
    """The tests' own environment with this interpreter's programs first, without a launcher's or SLURM's variables."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    return kept | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def command(runs: Path, cache: Path, *arguments: str, ranks: int | None = None) -> list[str]:
    """The command line of stage 2 on the tiny demo; with `ranks`, under the deepspeed launcher."""
    start = [sys.executable] if ranks is None else ["deepspeed", "--num_gpus", str(ranks), "--master_port", free_port()]
    return [
        *start,
        str(ROOT / "training" / "main.py"),
        *TINY,
        "--runs_dir",
        str(runs),
        "--cache_dir",
        str(cache),
        *arguments,
    ]


def free_port() -> str:
    """A port that nobody listens on, from below the range out of which Linux gives one to whoever wants any: until the
    test's process binds it, seconds later, no connection of another test gets it."""
    while True:
        port = 10_000 + secrets.randbelow(22_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return str(port)


def finish(
    command: Sequence[str], code: int = 0, timeout: float = 900, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run to the end; the exit code is asserted with the output in the message."""
    done = subprocess.run(
        list(command), cwd=ROOT, env=environment() | variables, capture_output=True, text=True, timeout=timeout,
        check=False,
    )  # fmt: skip
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def timeless(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without what depends on the clock."""
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]
