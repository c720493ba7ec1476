"""bfloat16 under every ZeRO stage on one rank: the same update, from the first step on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support.forked import finish_forked
from tests.support.student_models import save
from tests.support.teacher_models import save_tokenizer

WORKER = """
import json, sys
import torch
from configs.schema import ActorConfig, RunConfig, StudentConfig
from inference.attention.packing import Group
from training.student.actor import Actor
from training.student.adapters import plain_parameters
from training.objective import SUPERVISED, UpdateInput
from training.student.deepspeed_engine import start_distributed

torch.set_num_threads(1)
start_distributed()
groups = [Group((3, 4, 5), ((6, 7, 8, 2),)), Group((9,), ((10, 11, 2),))]
out = {}
for stage in (0, 1, 2, 3):
    config = RunConfig(
        student=StudentConfig(path=sys.argv[1], dtype="bfloat16"),
        actor=ActorConfig(zero_stage=stage, learning_rate=0.01),
    )
    actor = Actor(config, total_steps=2, learning_rate=0.01)
    before = {n: v.detach().clone() for n, v in plain_parameters(actor.policy.model, actor.engine.gathered)}
    first = actor.update([UpdateInput(None, [], groups, SUPERVISED)], 0)
    after = {n: v.detach().clone() for n, v in plain_parameters(actor.policy.model, actor.engine.gathered)}
    second = actor.update([UpdateInput(None, [], groups, SUPERVISED)], 1)
    moved = torch.cat([(after[name] - before[name]).float().flatten() for name in before])
    out[stage] = [first["grad_norm"], second["loss/bc"], second["grad_norm"], float(moved.abs().sum())]
print("RESULT " + json.dumps(out))
"""


def test_bfloat16_takes_the_same_steps_under_every_stage(tmp_path: Path) -> None:
    """DeepSpeed's optimizer without ZeRO counts a step on zeros at its start (0.73 of the first real step)."""
    save("llama", tmp_path)
    save_tokenizer(tmp_path)
    (tmp_path / "worker.py").write_text(WORKER)
    done = finish_forked([sys.executable, str(tmp_path / "worker.py"), str(tmp_path)])
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    out = json.loads(lines[0].removeprefix("RESULT "))
    for stage in ("0", "2", "3"):
        assert out[stage] == pytest.approx(out["1"], rel=2e-3), stage
