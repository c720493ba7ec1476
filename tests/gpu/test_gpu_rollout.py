"""DeepSpeed's rollout engine on the device, with injected kernels (compiled at first use) and without."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.device import DEVICE, DRY_RUN, ON_DEVICE
from tests.gpu.test_gpu_actor import a_model, work

pytestmark = ON_DEVICE


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_deepspeeds_rollout_passes_the_check_or_is_left(family: str, tmp_path: Path) -> None:
    """Injected kernels (llama) or transformers' generate (mistral, which DeepSpeed has none for): what samples in the
    end samples the policy, and the log says where another engine was left."""
    model = a_model(family, tmp_path / "student")
    job = {
        "name": "rollout", "dtype": "float32" if DRY_RUN else "bfloat16", "zero": 0, "rollout": "deepspeed",
        "sample": True,
    }  # fmt: skip
    results, log = work(model, [job], tmp_path, DEVICE)
    got = results["rollout"]
    assert "error" not in got, got["error"]
    print(f"{family}: {got['injected']} injected layers, {'stayed' if got['stayed'] else 'left'}\n{log[-1500:]}")
    assert got["tokens"] > 0
    assert got["stayed"] or (got["mismatch"] <= 0.05 and "goes native" in log)
    if family == "mistral":
        assert got["injected"] == 0
        assert got["stayed"]
