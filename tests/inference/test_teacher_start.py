"""The check of every start: a Megatron teacher beside transformers, and the line that refuses a wrong one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from configs.schema import RunConfig, TeacherConfig
from inference.model import teacher as megatron
from inference.model.backend import BACKENDS
from inference.server import launch, self_test
from tests.support.teacher_models import BUILDERS, build, save_tokenizer
from tests.support.teacher_servers import SERVER
from training.run.stopping import StopRequest
from training.run.supervisor import Supervisor

WRONG = """
import runpy, sys
from inference.model import teacher
right = teacher.inverse_frequencies
teacher.inverse_frequencies = lambda *given: right(*given) * 1.05
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def one_rank() -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def found(directory: Path, dtype: str = "float32") -> tuple[bool, str]:
    config = TeacherConfig(path=str(directory), tensor_parallel=1, dtype=dtype)  # type: ignore[arg-type]
    return self_test.against_transformers(config, BACKENDS["megatron"].load(config, torch.device("cpu")))


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.usefixtures("one_rank")
def test_every_family_agrees_and_the_first_layers_do(kind: str, tmp_path: Path) -> None:
    build(kind, tmp_path)
    good, said = found(tmp_path)
    assert good, said
    assert "all 3 layers" in said
    assert found(tmp_path, "bfloat16")[0]
    with mock.patch.object(self_test, "SMALL", 0):
        good, said = found(tmp_path)
    assert good, said
    assert "the first 2 of 3 layers" in said


@pytest.mark.parametrize("small", [0, 1 << 30])
@pytest.mark.usefixtures("one_rank")
def test_a_slightly_wrong_rope_is_seen_in_both_types(small: int, tmp_path: Path) -> None:
    build("qwen3", tmp_path)
    save_tokenizer(tmp_path)
    right = megatron.inverse_frequencies
    with (
        mock.patch.object(self_test, "SMALL", small),
        mock.patch.object(megatron, "inverse_frequencies", lambda *given: right(*given) * 1.05),
    ):
        for dtype in ("float32", "bfloat16"):
            good, said = found(tmp_path, dtype)
            assert not good, said


@pytest.mark.usefixtures("one_rank")
def test_a_mistral_with_windows_in_some_layers_agrees(tmp_path: Path) -> None:
    build("mistral", tmp_path)
    file = tmp_path / "config.json"
    described = {**json.loads(file.read_text()), "layer_types": ["sliding_attention", "full_attention"] * 2}
    file.write_text(json.dumps({**described, "layer_types": described["layer_types"][:3]}))
    assert found(tmp_path)[0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_wrong_teacher_is_refused_in_one_line(ranks: int, tmp_path: Path) -> None:
    build("llama3", tmp_path)
    command = [sys.executable, "-c", WRONG, str(SERVER), "--path", str(tmp_path), "--tensor_parallel", str(ranks)]
    environment = {**os.environ, "GRPO_KD_TEACHER_SECRET": "x", "PYTHONPATH": str(SERVER.parents[1])}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 2, ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if "error" in line]
    assert "teacher.path" in line
    assert "nats from transformers' own (allowed 1.0e-03); all 3 layers" in line
    assert "set teacher.backend to transformers" in line


def test_a_trainer_is_told_the_same_line_and_ends_with_2(tmp_path: Path) -> None:
    build("llama", tmp_path / "model")
    server = tmp_path / "server.py"
    server.write_text(
        f"import sys\nsys.path.insert(0, {str(SERVER.parents[1])!r})\nsys.argv.insert(1, {str(SERVER)!r})" + WRONG
    )
    config = TeacherConfig(tensor_parallel=1)
    work = tmp_path / "work"
    with mock.patch.object(launch, "_SERVER", server), pytest.raises(launch.TeacherDied) as died:
        launch.start_local_teacher(config, tmp_path / "model", work)
    assert died.value.mistake
    assert str(died.value).startswith("teacher.path = ")
    assert "\n" not in str(died.value)

    def start() -> int:
        raise died.value

    supervisor = Supervisor(RunConfig(runs_dir=str(tmp_path)), tmp_path, StopRequest())
    assert supervisor.run(start) == 2


def test_a_large_teacher_may_take_longer_to_start(tmp_path: Path) -> None:
    """140 GB come from a disk that gives 100 MB/s after 23 minutes: at each start, so that no start would bring it."""
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(140_000_000_000)
    assert launch.start_timeout_s(tmp_path) == 600 + 2800
