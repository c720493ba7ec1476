"""What the tests of this folder change in the product is there: nobody else would notice before there is a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.gpu import device
from tests.gpu.bench_worker import Bench
from tests.gpu.device import KERNELS, a_row, policy_on, varlen_attention


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_packed_row_goes_through_the_kernel_that_is_asked_for(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(*tensors: torch.Tensor, **settings: Any) -> torch.Tensor:
        calls.append(len(tensors))
        return varlen_attention(*tensors, **settings)

    monkeypatch.setattr(device, "DRY_RUN", True)
    monkeypatch.setattr(device, "varlen_attention", counted)
    KERNELS[kernel](monkeypatch)
    policy, row = policy_on(torch.device("cpu"), "llama", "bfloat16", grouped=True), a_row()
    policy(row)
    assert bool(calls) == (kernel == "flash")
    calls.clear()
    with Bench.kernel(Bench.__new__(Bench), "grouped, SDPA"):
        policy(row)
    assert not calls
