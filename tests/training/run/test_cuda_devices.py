"""What crosses devices, without a GPU: calls on fake CUDA tensors, which know their device and hold no numbers.

NCCL takes tensors of its own device only, and no operation mixes devices.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from configs.schema import TeacherConfig
from inference.attention import packed
from inference.attention.grouped import ScoreRule
from inference.attention.packing import Group, pack_row
from inference.attention.varlen import flash_attention
from inference.server.launch import choose_devices, place, weight_bytes
from training import distributed
from training.losses import OutputLayer
from training.run.supervisor import is_out_of_memory
from training.student.deepspeed_engine import Engine, start_distributed
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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, found in ((7, 5), None), ((9, 0), "inference.attention.varlen"):  # torch's own, behind ours
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        flash_attention.cache_clear()
        try:
            assert getattr(flash_attention(torch.device("cuda", 0)), "__module__", None) == found
        finally:
            flash_attention.cache_clear()
        assert ("undefined symbol" in caplog.text) == (found is not None)  # on Turing it is not even asked


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
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for named, chosen in {None: "0", "3": "3", "MIG-a,MIG-b": "MIG-a"}.items():
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if named is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
        assert place(TeacherConfig(tensor_parallel=2, dtype="bfloat16"), tmp_path) == {"CUDA_VISIBLE_DEVICES": chosen}


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


def test_what_torch_keeps_is_free_for_the_weights_of_a_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an update it has taken nearly all of the device, and uses little of that."""
    engine = Engine.__new__(Engine)
    engine.device, engine._said_no_room = torch.device("cuda", 0), False
    for name, value in {"mem_get_info": (10, 80), "memory_reserved": 70, "memory_allocated": 20}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    weights = {n: SimpleNamespace(ds_numel=n, element_size=lambda: 1) for n in (30, 31)}
    assert engine._room_for_all([weights[30]])
    assert not engine._room_for_all([weights[31]])


def test_a_task_that_sees_its_own_gpu_alone_is_number_0_for_deepspeed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """`srun --gpus-per-task=1`: DeepSpeed takes the device of LOCAL_RANK, whatever torch was set to."""
    found: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **_: found.append(int(os.environ["LOCAL_RANK"])))
    kept = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", **kept}.items():
        monkeypatch.setenv(name, value)
    start_distributed()
    assert found == [0, 0]


def test_what_is_said_of_a_row_on_the_device_is_looked_up_where_it_is() -> None:
    """A tensor of the CPU takes no index on CUDA; fake tensors would."""

    class Values:
        device = torch.device("cpu")

        def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
            assert index.device == self.device
            return torch.zeros(len(index))

    engine = Engine.__new__(Engine)
    values_S: Any = Values()
    engine.device = torch.device("cuda", 0)
    with FakeTensorMode():
        row: Any = SimpleNamespace(place_S=torch.zeros(2, dtype=torch.int64, device="cuda:0"))
        assert engine.of_row(row, values_S).device == engine.device


def test_a_head_that_no_kernel_takes_goes_through_our_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn refuses more than 256 (Gemma 4's global layers have 512)."""
    calls: list[int] = []

    def kernel(query: torch.Tensor, *_: torch.Tensor, **__: object) -> torch.Tensor:
        calls.append(query.shape[-1])
        return query

    monkeypatch.setattr(packed, "flash_attention", lambda _: kernel)
    row = pack_row([Group((1, 2, 3), ((4, 5), (6, 7, 8)))])
    for size in (256, 264):
        heads = [torch.zeros(len(row.tokens_T), 2, size, dtype=torch.bfloat16)] * 3
        packed.PackedPlan(row).attend(0, *heads, ScoreRule(1.0))
    assert calls == [256]
