"""The embedded demo as seen by the trainer: build its parts on first use and put real paths into the configuration."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.io.files import locked
from configs.models import DEMO_STAGE1
from configs.schema import DEMO, RunConfig
from inference.server.launch import launcherless_environment
from training.data.preflight import DEMOS, with_models
from training.objective import pt_coef
from training.run.cli import DEMO_CONFIGS, ROOT, fail, is_demo
from training.run.launcher import environment_rank

log = logging.getLogger(__name__)

STAGE1_SOURCES = (
    "training/supervised.py",
    "training/student/actor.py",
    "training/student/policy.py",
    "training/data/prompts.py",
    "configs/demo/sft.yaml",
)
"""Files that the student after stage 1 depends on; a change in one builds it anew."""
STAGE1: dict[str, dict[str, Any]] = {
    "demo": {},
    "small": {},
    # The tiny teacher says little that is worth learning.
    "tiny": {"sft.answers": "data", "sft.steps": 160, "sft.learning_rate": 2.0e-3},
}
"""What differs from configs/demo/sft.yaml, by size of the demo."""
MORE = {"sft.steps": 1000, "sft.learning_rate": 2.0e-3}
"""More of stage 1, in about the time that the demo's stage 2 takes; the tiny demo has no such baseline."""


def demo_parts(config: RunConfig, *, stage: int) -> list[str]:
    """The settings that stage 0, 1 or 2 reads and that are the embedded demo's."""
    data = config.data
    read: dict[str, str | None] = {"student.path": config.student.path}
    if stage > 0:
        read["data.heldout"] = data.heldout
    if stage == 2 or (stage == 1 and config.sft.answers == "teacher"):
        read |= {"teacher.path": config.teacher.path, "data.prompts": data.prompts}
    if stage == 2:
        read |= {f"{key}.path": teacher.path for key, teacher in config.every_teacher.items()}
    if stage == 0 or (stage == 2 and pt_coef(config) > 0):
        read["data.text"] = data.text
    supervised = stage == 2 and (config.loss.bc_coef > 0 or config.phases.every > 0)
    if supervised or (stage == 1 and config.sft.answers == "data"):
        read["data.warmup"] = data.warmup
    return [key for key, value in read.items() if value in DEMOS]


def resolve_demo(config: RunConfig, *, stage: int) -> RunConfig:
    """Replace `demo` by paths, building what is not cached yet. In stage 2 the demo's student is the one after stage 1.
    The demo's open questions go with its held-out ones only, and its baseline with its student.

    Processes that start together build once; the others wait.
    """
    if config.eval.baseline == DEMO and (config.student.path not in DEMOS or config.demo_size == "tiny"):
        config = replace(config, eval=replace(config.eval, baseline=None))
    if config.data.heldout != DEMO and config.data.open == DEMO:
        config = replace(config, data=replace(config.data, open=None))
    parts = demo_parts(config, stage=stage)
    if not parts:
        return config
    if not is_demo(config) and environment_rank() == 0:
        said = "%s: not set, so the demo's is used with models that are not the demo's; set your own"
        log.warning(said, ", ".join(parts))
    from training.data.demo.models import ensure_demo

    cache = Path(config.cache_dir)
    built = ensure_demo(cache, size=config.demo_size)
    models = {"student.path": built.student_base, "teacher.path": built.teacher}
    if config.student.path == DEMO_STAGE1 or (stage == 2 and config.student.path == DEMO):
        models["student.path"] = _stage1(config, built.student_base, STAGE1[config.demo_size])
        if config.eval.baseline == DEMO:
            models["eval.baseline"] = _stage1(config, models["student.path"], MORE)
    files = {
        "prompts": built.rl,
        "warmup": built.warmup,
        "heldout": built.heldout,
        "open": built.open,
        "text": built.text,
    }
    demo_files: dict[str, Any] = {name: str(path) for name, path in files.items() if getattr(config.data, name) == DEMO}
    config = replace(config, data=replace(config.data, **demo_files))
    return with_models(config, lambda key, path: str(models.get(key, built.teacher)) if path in DEMOS else path)


def _stage1(config: RunConfig, start: Path, settings: Mapping[str, Any]) -> Path:
    """The student `start` after stage 1 by configs/demo/sft.yaml and `settings`, made once and kept beside it."""
    sources = b"".join((ROOT / name).read_bytes() for name in STAGE1_SOURCES)
    key = hashlib.sha256(sources + json.dumps([start.name, dict(settings)]).encode()).hexdigest()[:12]
    target = start.parent / f"student-{key}"
    with locked(start.parent / ".stage1.lock"):
        if not target.is_dir():
            more = start.name != "student-base"
            what = (
                "as long a time of more of stage 1, to compare stage 2 with"
                if more
                else "stage 1, on the teacher's answers"
            )
            print(f"demo: {what}", file=sys.stderr, flush=True)
            runs = start.parent / "stage1-runs"
            if (runs / key / "summary.json").is_file():  # finished: who deleted its student wants a new one
                shutil.rmtree(runs / key)
            given = {
                "config": DEMO_CONFIGS / "sft.yaml",
                "cache_dir": config.cache_dir,
                "demo_size": config.demo_size,
                "student.path": start,
                "sft.output": target,
                "runs_dir": runs,
                "name": key,
                **settings,
            }
            flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
            command = [sys.executable, str(ROOT / "training" / "sft.py"), *flags]
            done = subprocess.run(command, env=launcherless_environment(), check=False)
            if done.returncode != 0 or not target.is_dir():
                fail(f"the demo's stage 1 ended with exit code {done.returncode}; its messages are above")
    return target
