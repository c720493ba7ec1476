"""The actor under DeepSpeed on one GPU, against the same steps in float32 on the CPU (ZeRO 0).

Compared is how far three steps of AdamW moved the weights. Adam divides by the gradient's size, so an element whose
gradient is little more than rounding may go either way: float32 is held to 2 % of the distance moved, not to the last
bits. In bfloat16 the weights themselves are rounded to 8 bits, of the size of a step (1e-3 of weights of 0.3), so only
the direction is compared (cosine), and the loss.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.gpu.device import DEVICE, DRY_RUN, ON_DEVICE, cosine, relative, worker_environment

pytestmark = ON_DEVICE
WORKER = Path(__file__).resolve().parent / "actor_worker.py"
PLAIN: list[dict[str, Any]] = [
    {"name": f"{dtype}-zero{zero}{'-offload' if offload else ''}", "dtype": dtype, "zero": zero, "offload": offload}
    for dtype in ("float32", "bfloat16")
    for zero, offload in ((0, False), (1, False), (2, False), (2, True), (3, False), (3, True))
]
ADAPTERS: list[dict[str, Any]] = [
    {"name": "float32-adapter", "dtype": "float32", "zero": 1, "rank": 4},
    {"name": "bfloat16-adapter", "dtype": "bfloat16", "zero": 1, "rank": 4},
]
FOUR_BIT: dict[str, Any] = {"name": "four-bit", "dtype": "bfloat16", "zero": 0, "rank": 4, "four_bit": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_model("llama", tmp_path_factory.mktemp("student"))


def a_model(family: str, path: Path) -> Path:
    from tests.support.student_models import save
    from tests.support.teacher_models import save_tokenizer

    if family == "wide llama":  # a row of a matrix is one block of 4-bit weights or more
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=50, num_key_value_heads=2, initializer_range=0.1, eos_token_id=2, **sizes)
        LlamaForCausalLM(config).save_pretrained(path)
    else:
        save(family, path)
    save_tokenizer(path)
    return path


def work(
    model: Path, jobs: list[dict[str, Any]], out: Path, device: torch.device
) -> tuple[dict[str, dict[str, Any]], str]:
    """Results by name, and what the worker said."""
    (out / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, str(WORKER), str(model), str(out / "jobs.json"), str(out)],
        env=worker_environment(device), capture_output=True, text=True, timeout=580 if DRY_RUN else 170, check=False,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(lines) == len(jobs), done.stdout[-1500:] + done.stderr[-3000:]
    results = [json.loads(line.removeprefix("RESULT ")) for line in lines]
    return {result["name"]: result for result in results}, done.stderr


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict[str, Any]], Path]:
    out = tmp_path_factory.mktemp("cpu")
    jobs = [{"name": "plain", "dtype": "float32", "zero": 0}, {**ADAPTERS[0], "name": "adapter"}]
    return work(model, jobs, out, torch.device("cpu"))[0], out


@pytest.fixture(scope="module")
def trained(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict[str, Any]], Path]:
    out = tmp_path_factory.mktemp("device")
    return work(model, PLAIN + ADAPTERS, out, DEVICE)[0], out


def moved(start: Path, end: Path) -> dict[str, torch.Tensor]:
    """How far each parameter went."""
    before, after = load_file(start / "model.safetensors"), load_file(end)
    return {name: after[name] - before[name].float() for name in before}


@pytest.mark.parametrize("job", [*PLAIN, *ADAPTERS], ids=lambda job: job["name"])
def test_steps_are_those_of_the_cpu(
    job: dict[str, Any], model: Path, expected: tuple[dict[str, Any], Path], trained: tuple[dict[str, Any], Path]
) -> None:
    kind = "adapter" if "rank" in job else "plain"
    want, got = expected[0][kind], trained[0][job["name"]]
    assert "error" not in want, want["error"]
    assert "error" not in got, got["error"]
    assert got["device"].startswith(DEVICE.type)
    assert got["skipped"] == 0
    went = moved(model, trained[1] / f"{job['name']}.safetensors")
    meant = moved(model, expected[1] / f"{kind}.safetensors")
    if job["dtype"] == "float32":
        assert got["losses"] == pytest.approx(want["losses"], abs=1e-3)
        assert relative(went, meant) <= 0.02
    else:
        assert got["losses"][0] == pytest.approx(want["losses"][0], abs=0.1)
        if kind == "plain":
            assert cosine(went, meant) >= 0.8
        # An adapter's change of a weight is far below the 8 bits that merged weights are rounded to: only the loss.
        assert got["losses"][-1] < got["losses"][0]


@pytest.mark.skipif(DRY_RUN, reason="on the CPU bitsandbytes repacks weights once they are sampled from")
def test_four_bit_weights_train_an_adapter(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = a_model("wide llama", tmp_path / "student")
    got = work(model, [FOUR_BIT], tmp_path, DEVICE)[0]["four-bit"]
    assert "error" not in got, got["error"]
    assert got["skipped"] == 0
    assert got["losses"][-1] < got["losses"][0]
