"""What crosses devices, without a GPU: calls on fake CUDA tensors, which know their device and hold no numbers.

NCCL takes tensors of its own device only, and no operation mixes devices.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from configs.schema import TeacherConfig
from inference.attention.varlen import flash_attention
from inference.server.launch import choose_devices, place, weight_bytes
from training import distributed
from training.losses import OutputLayer
from training.run.supervisor import is_out_of_memory
from training.student.deepspeed_engine import Engine
from training.teacher.link import chosen_logprobs

ROOT = Path(__file__).resolve().parents[3]
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
        out_S = chosen_logprobs(hidden_SD, OutputLayer(torch.zeros(9, 4, device="cuda:0")), labels_S, chunk=3)
    assert out_S.device.type == "cpu"
    assert out_S.shape == (7,)


def test_the_trainer_speaks_to_its_ranks_in_one_place() -> None:
    """Elsewhere nobody would know the device; DeepSpeed's own collectives are its own."""
    strays = set()
    for file in (ROOT / "training").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            if any(name.startswith("torch.distributed") for name in names):
                strays.add(file.name)
    assert strays == {"distributed.py", "launcher.py"}  # and before they have met


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


@pytest.mark.parametrize(
    ("devices", "parallel", "ranks", "chosen", "shared"),
    [
        (None, 2, 2, ["2", "3"], False),  # those that the ranks leave
        (None, 1, 3, ["3"], False),
        (None, 2, 3, ["0", "1", "2", "3"], True),  # one is left, two are asked for
        (None, 1, 4, ["0", "1", "2", "3"], True),
        ("1, 3", 2, 1, ["1", "3"], False),
        ("0,3", 2, 1, ["0", "3"], True),
    ],
)
def test_where_a_teacher_runs_beside_its_trainer(
    devices: str | None, parallel: int, ranks: int, chosen: list[str], shared: bool
) -> None:
    config = TeacherConfig(devices=devices, tensor_parallel=parallel)
    assert choose_devices(config, ["0", "1", "2", "3"], ranks) == (chosen, shared)


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"teacher.devices = '0,7': no CUDA device 7; there are 0, 1"):
        choose_devices(TeacherConfig(devices="0,7"), ["0", "1"], 1)
    with pytest.raises(ValueError, match=r"teacher.devices = ' ': no CUDA device is named"):
        choose_devices(TeacherConfig(devices=" "), ["0", "1"], 1)


def test_a_teacher_that_fits_on_no_device_is_refused_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"dtype": "float32"}')
    (tmp_path / "model.safetensors").write_bytes(bytes(4000))
    assert weight_bytes(tmp_path, "float32") == 4000
    assert weight_bytes(tmp_path, "bfloat16") == 2000
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=1500))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ValueError, match=r"teacher.tensor_parallel = 1: .* raise it"):
        place(TeacherConfig(tensor_parallel=1, dtype="bfloat16"), tmp_path)
    assert place(TeacherConfig(tensor_parallel=2, dtype="bfloat16"), tmp_path) == {"CUDA_VISIBLE_DEVICES": "0,1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=9000))
    assert place(TeacherConfig(tensor_parallel=1, dtype="bfloat16"), tmp_path) == {"CUDA_VISIBLE_DEVICES": "6"}


@pytest.mark.parametrize(
    "said", ["CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "CUDA out of memory"]
)
def test_a_library_that_gets_no_memory_is_out_of_memory(said: str) -> None:
    assert is_out_of_memory(RuntimeError(f"CUDA error: {said}"))
    assert not is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"))


def test_weights_that_do_not_fit_beside_a_rollout_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """Half of the free memory is for caches. A petabyte fits nowhere, a byte does."""
    engine = Engine.__new__(Engine)
    engine.device, engine._said_no_room = torch.device("cpu"), False
    small, large = (SimpleNamespace(ds_numel=n, element_size=lambda: 1) for n in (1, 10**15))
    assert engine._room_for_all([small])
    assert not engine._room_for_all([small, large])
    assert not engine._room_for_all([small, large])
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert said[0].startswith("actor.zero_stage = 3: the student's weights take 1000000.0 GB")
