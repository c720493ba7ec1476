"""The embedded demo as seen by the trainer: build its parts on first use and put real paths into the configuration."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from configs.schema import DEMO, RunConfig
from inference.launch import launcherless_environment
from training.cli import DEMO_CONFIGS, ROOT, fail
from training.preflight import with_paths

WARMUP_SOURCES = (
    "training/sft.py",
    "training/actor.py",
    "training/policy.py",
    "training/data.py",
    "configs/demo/sft.yaml",
)
"""Files that the warmed-up student depends on; a change in one builds it anew."""


def uses_demo(config: RunConfig, *, stage: int) -> bool:
    """Whether any part that stage 1 or 2 reads is the embedded demo."""
    data = config.data
    if stage == 1:
        read = [config.student.path, data.warmup, data.heldout]
        read += [config.teacher.path] if config.sft.answers == "teacher" else []
    else:
        read = [
            config.student.path,
            config.teacher.path,
            *(t.path for t in config.teachers),
            data.prompts,
            data.heldout,
        ]
        read += [data.text or ""] if config.pt_coef > 0 else []
        read += [data.warmup] if config.loss.bc_coef > 0 or config.phases.every > 0 else []
    return DEMO in read


def resolve_demo(config: RunConfig, *, stage: int) -> RunConfig:
    """Replace `demo` by paths, building what is not cached yet. In stage 2 the demo's student is the warmed-up one.

    Processes that start together build once; the others wait.
    """
    if not uses_demo(config, stage=stage):
        return config
    from training.demo_models import ensure_demo

    cache = Path(config.cache_dir)
    built = ensure_demo(cache, threads=config.threads, size=config.demo_size)
    student = built.student_base
    if stage == 2 and config.student.path == DEMO:
        student = _warmed_up(config, built.student_base.parent)
    return with_paths(
        config, student=str(student), teacher=str(built.teacher), prompts=str(built.rl), warmup=str(built.warmup),
        heldout=str(built.heldout), text=str(built.text),
    )  # fmt: skip


def _warmed_up(config: RunConfig, demo: Path) -> Path:
    """The demo's student after stage 1: `training/sft.py` with configs/demo/sft.yaml, once."""
    from training.demo_models import locked

    key = hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in WARMUP_SOURCES)).hexdigest()[:12]
    target = demo / f"student-warm-{key}"
    if target.is_dir():
        return target
    with locked(demo / ".warmup.lock"):
        if target.is_dir():
            return target
        print("demo: stage 1, warming the student up on answers from the data", file=sys.stderr, flush=True)
        command = [
            sys.executable, str(ROOT / "training" / "sft.py"), "--config", str(DEMO_CONFIGS / "sft.yaml"),
            "--cache_dir", config.cache_dir, "--demo_size", config.demo_size, "--sft.output", str(target),
            "--runs_dir", str(demo / "warmup-runs"), "--name", key,
        ]  # fmt: skip
        done = subprocess.run(command, env=launcherless_environment(), check=False)
        if done.returncode != 0 or not target.is_dir():
            fail(f"the demo's stage 1 ended with exit code {done.returncode}; its messages are above")
    return target
