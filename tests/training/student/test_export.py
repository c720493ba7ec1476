"""A model directory is replaced in one move, a start that was killed leaves none behind for good, and all that was read
is written."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from configs.schema import AdapterConfig
from tests.support.model_zoo import make
from tests.support.student_models import build
from training.student.adapters import plain_parameters, save_plain
from training.student.export import replace_directory
from training.student.loading import difference, load_policy
from training.student.policy import Policy


def whole(fresh: Path) -> None:
    (fresh / "model").write_text("whole")


def full(fresh: Path) -> None:
    (fresh / "model").write_text("half")
    raise OSError("No space left on device")


def test_what_a_killed_start_left_is_removed(tmp_path: Path) -> None:
    """It is as large as the model; that of another export, which may be under way, is not touched."""
    for name in (".export.export-a1b2c3d4", ".export.v2.export-a1b2c3d4"):
        (tmp_path / name / "new").mkdir(parents=True)
    replace_directory(tmp_path / "export", whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".export.v2.export-a1b2c3d4", "export"]


def test_what_fails_leaves_the_one_before(tmp_path: Path) -> None:
    replace_directory(tmp_path / "export", whole)
    with pytest.raises(OSError, match="No space left"):
        replace_directory(tmp_path / "export", full)
    assert (tmp_path / "export" / "model").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_read_again_may_be_as_far_as_rounding_takes_it(dtype: str, tmp_path: Path) -> None:
    """It is computed on the CPU, and a student on CUDA rounds otherwise: in bfloat16 these wild weights by a nat."""
    model = build("llama").to(getattr(torch, dtype))
    for weight in model.parameters():
        weight.data *= 1.0 if weight.dim() == 1 else 3.0
    model.save_pretrained(tmp_path)
    gap, limit = difference(Policy(model), tmp_path, dtype)
    assert gap <= limit
    assert limit == 2e-3 if dtype == "float32" else 0.2 < limit < 10.0


@pytest.mark.parametrize(("family", "rank"), [("glm4_moe", 0), ("glm4_moe", 2), ("apertus", 0)])
def test_buffers_of_the_file_are_written_too(family: str, rank: int, tmp_path: Path) -> None:
    """Without what balances its experts the model would be another, and the run would end without an export."""
    model = make(family)
    for name, buffer in model.named_buffers():
        if name in model.state_dict():
            torch.nn.init.normal_(buffer)
    model.save_pretrained(tmp_path / "start")
    policy = load_policy(tmp_path / "start", "float32", adapter=AdapterConfig(rank=rank, targets="q_proj"))
    save_plain(policy.model, dict(plain_parameters(policy.model, lambda _: nullcontext())), tmp_path / "export")
    start, end = (load_file(tmp_path / name / "model.safetensors") for name in ("start", "export"))
    assert set(end) == set(start)
    torch.testing.assert_close(end, start, atol=0, rtol=0)
