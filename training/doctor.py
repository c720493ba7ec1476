"""`training/main.py --doctor`: are the numbers of this run right? One line a check; nothing is trained or written.

It starts the configured run as a run does (same demo, same teacher server, same ranks), takes one step of few prompts
with learning rate 0, and takes it again cut otherwise. A check that cannot be made says why and is not counted as
passed. Exit code 0 unless a check fails.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from configs.schema import RunConfig
from inference.client import TeacherLost, TeacherRefused
from inference.launch import SECRET, TeacherDied
from training import distributed
from training.cli import fail
from training.deepspeed_engine import start_distributed
from training.doctor_checks import (
    Finding,
    Patient,
    first_step,
    kl_to_reference,
    kl_to_teacher,
    micro_batch,
    packing,
    padding,
    ranks,
    ratio,
    sampling,
)
from training.doctor_teacher import end_symbols, tensor_parallel, tokenizers
from training.run import Setup, find_teacher, prepare, quiet_logging, start_models
from training.run_folder import RunFolder
from training.stopping import StopRequest, watch_launcher

CHECKS: dict[str, Callable[[Patient], Finding]] = {
    "tokenizer": tokenizers,
    "end symbols": end_symbols,
    "sampling": sampling,
    "ratio": ratio,
    "KL teacher": kl_to_teacher,
    "KL reference": kl_to_reference,
    "padding": padding,
    "micro-batch": micro_batch,
    "packing": packing,
    "ranks": ranks,
    "TP": tensor_parallel,
}
"""By the name that its line starts with, in order."""

PROMPTS_PER_RANK = 4
"""Prompts of the step; at most what the run itself takes."""


def doctor(config: RunConfig) -> int:
    """Run every check on the configured run; returns the exit code. Collective."""
    stop = StopRequest()
    watch_launcher()
    quiet_logging()
    with tempfile.TemporaryDirectory(prefix="doctor-") as folder, ExitStack() as stack:
        try:
            config, facts, inputs = prepare(config)
            setup = Setup(small_step(config), inputs, facts, RunFolder(Path(folder)), stop)
        except (ValueError, OSError) as error:
            fail(" ".join(str(error).split()))
        try:
            return report(examine(admit(setup, stack)))
        except (TeacherLost, TeacherRefused, TeacherDied) as error:
            _say(f"teacher        FAIL {' '.join(str(error).split())}")
            return 1


def small_step(config: RunConfig) -> RunConfig:
    """The same run with few prompts a step, one optimizer step on them, and a learning rate of 0."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = min(PROMPTS_PER_RANK, config.prompts_per_step // world)
    return replace(
        config,
        prompts_per_step=max(rank, 1) * world,
        actor=replace(config.actor, learning_rate=0.0, updates_per_rollout=1),
        critic=replace(config.critic, learning_rate=0.0, warmup_steps=0),
        loss=replace(config.loss, gradient_shares_every=0),
    )


def admit(setup: Setup, stack: ExitStack) -> Patient:
    """Start the teacher and the models, and take the first step. Collective."""
    start_distributed()
    asked = setup.config.teacher
    # Found or started once, here, so that the checks can start other clients of the same server.
    address, secret = find_teacher(asked, setup.folder.path / "teacher", stack)
    os.environ[SECRET] = secret
    setup = replace(setup, config=replace(setup.config, teacher=replace(asked, address=address), teachers=()))
    _, models = start_models(setup, stack)
    return first_step(setup, models, local_teacher=asked.address is None)


def examine(patient: Patient) -> list[Finding]:
    """Every check in turn, with its line as soon as it is known. Collective."""
    return [_one(name, check, patient) for name, check in CHECKS.items()]


def _one(name: str, check: Callable[[Patient], Finding], patient: Patient) -> Finding:
    finding = check(patient)
    if finding.passed is not None:  # all ranks agree, and one bad rank is enough
        finding = replace(finding, passed=not distributed.any_rank(not finding.passed))
    word = {True: "pass", False: "FAIL", None: "skipped:"}[finding.passed]
    _say(f"{name:14} {word} {finding.text}")
    return finding


def report(findings: list[Finding]) -> int:
    """The last line, and the exit code."""
    counts = [sum(f.passed is value for f in findings) for value in (True, False, None)]
    _say(f"{'':14} {counts[0]} passed, {counts[1]} failed, {counts[2]} skipped")
    return 1 if counts[1] else 0


def _say(line: str) -> None:
    if distributed.environment_rank() == 0:
        print(line, flush=True)
