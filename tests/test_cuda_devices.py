"""What crosses devices, without a GPU: calls on fake CUDA tensors, which know their device and hold no numbers.

NCCL takes tensors of its own device only, and no operation mixes devices.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from inference.varlen import flash_attention
from training import distributed
from training.teaching import chosen_logprobs

ROOT = Path(__file__).resolve().parent.parent
CALLS: dict[str, Callable[[], object]] = {
    "sum of a CPU tensor": lambda: distributed.sum_over_ranks(torch.zeros(3)),
    "sum of a CUDA tensor": lambda: distributed.sum_over_ranks(torch.zeros(3, device="cuda:0")),
    "max": lambda: distributed.max_over_ranks(2.0),
    "any": lambda: distributed.any_rank(True),
    "metrics": lambda: distributed.sum_metrics({"a": 1.0, "b": 2.0}),
    "strings": lambda: distributed.gather_strings(["a", "ð"]),
}


@pytest.mark.parametrize("name", CALLS)
def test_collectives_get_tensors_on_nccls_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, op=None: seen.append(tensor))
    monkeypatch.setattr(dist, "all_gather", lambda out, tensor, group=None: seen.extend([*out, tensor]))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    result: object = None
    with FakeTensorMode():
        try:
            result = CALLS[name]()
        except DataDependentOutputException:  # it wants a number of what came back: the collective itself has passed
            assert seen
        devices = {tensor.device for tensor in seen}
        assert devices == {torch.device("cuda", 0)}
        assert not isinstance(result, torch.Tensor) or result.device.type == "cpu"


def test_the_teachers_output_layer_may_be_on_another_device_than_its_states() -> None:
    with FakeTensorMode():
        hidden_SD, labels_S = torch.zeros(7, 4, dtype=torch.bfloat16), torch.zeros(7, dtype=torch.int64)
        out_S = chosen_logprobs(hidden_SD, torch.zeros(9, 4, device="cuda:0"), labels_S, chunk=3)
    assert out_S.device.type == "cpu"
    assert out_S.shape == (7,)


def test_the_trainer_speaks_to_its_ranks_in_one_place() -> None:
    """Elsewhere nobody would know the device; DeepSpeed's own collectives are its own."""
    strays = set()
    for file in (ROOT / "training").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            if any(name.startswith("torch.distributed") for name in names):
                strays.add(file.name)
    assert strays == {"distributed.py"}


def test_a_flash_attention_that_does_not_load_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')\n")
    monkeypatch.syspath_prepend(tmp_path)
    flash_attention.cache_clear()
    try:
        assert flash_attention(torch.device("cuda", 0)) is None
    finally:
        flash_attention.cache_clear()
    assert "undefined symbol" in caplog.text
