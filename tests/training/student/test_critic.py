"""The critic's backbone computes what the student's does."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from configs.schema import RunConfig, StudentConfig
from inference.attention.packing import Group, pack_row
from tests.support.student_models import save
from training.student import critic
from training.student.critic import Critic
from training.student.loading import load_policy


def test_its_positions_are_the_students(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 too, where rotary frequencies stay float32: rounded to 8 bits they turn a later token elsewhere."""
    save("llama", tmp_path)
    monkeypatch.setattr(critic, "Engine", lambda module, *_: SimpleNamespace(module=module))
    config = RunConfig(student=StudentConfig(path=str(tmp_path), dtype="bfloat16"))
    module = Critic(config, total_steps=1).engine.module.eval()
    torch.nn.init.normal_(module.head.weight)
    row = pack_row([Group(tuple(range(3, 45)), ((7, 8, 9, 10),))])
    with torch.no_grad():
        states_SD = load_policy(tmp_path, "bfloat16").eval().response_states(row)
        assert torch.equal(module(row), module.head(states_SD).float()[:, 0])
