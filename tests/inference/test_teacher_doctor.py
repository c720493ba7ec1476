"""`--doctor`: it says where the teacher is, passes a good one, and fails one whose numbers are wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from configs.schema import TeacherConfig
from inference.model.backend import BACKENDS
from inference.server import self_test
from tests.support.teacher_models import build, save_tokenizer
from tests.support.teacher_servers import SERVER


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("teacher") / "tiny"
    build("qwen3", directory)
    save_tokenizer(directory)
    return directory


def doctor(model: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "GRPO_KD_TEACHER_SECRET"}
    command = [sys.executable, str(SERVER), "--path", str(model), *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


def test_a_good_teacher_passes_without_a_secret(model: Path) -> None:
    ended = doctor(model, "--tensor_parallel", "2", "--doctor_reference")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = {line[:10].strip(): line[11:] for line in ended.stdout.splitlines()}
    assert set(lines) == {"model", "rank 0", "rank 1", "weights", "packed", "decoding", "reference", "speed"}
    assert "tiny: megatron, float32, vocabulary 101, tensor parallel 2" in lines["model"]
    assert "cpu, 1 threads, shard" in lines["rank 1"]
    for check in ("weights", "packed", "decoding", "reference"):
        assert lines[check].startswith("PASS")
    assert int(re.match(r"(\d+) packed tokens/s", lines["speed"])[1]) > 0  # type: ignore[index]


def test_a_teacher_with_a_broken_weight_fails(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for file in tmp_path.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith("layers.1.mlp.down_proj.weight"):
                tensor[3, 5] = float("nan")
        save_file(tensors, file, metadata={"format": "pt"})
    monkeypatch.setattr(self_test, "_speed", lambda backend: "not measured")
    config = TeacherConfig(path=str(tmp_path), tensor_parallel=1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert not self_test.examine(config, BACKENDS["megatron"].load(config, torch.device("cpu")), reference=False)
    finally:
        dist.destroy_process_group()
    out = capsys.readouterr().out
    assert "weights    FAIL not finite: decoder.layers.1.mlp.linear_fc2.weight" in out
    assert "packed     FAIL" in out
    assert "speed" in out
