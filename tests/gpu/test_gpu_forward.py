"""Packed rows on the device against plain rows on the CPU: log-probabilities and gradients.

The CPU side is transformers' own attention in float32 on the same (rounded) weights. Tolerances:

- float32: products are not TF32 (torch's default), so what is left is the order of sums, about 1e-6 of logits of size
  10: 1e-4 nats and 1e-3 of the gradient's norm leave a factor of ten and more.
- bfloat16: 8 bits of mantissa, 0.4 % at each operation, whatever computes it. So packed rows may be no further from the
  float32 numbers than twice what plain rows of the same type on the same device are (plus a little where both are
  near 0); that a test of bfloat16 by itself would pass is not asked for.
"""

from __future__ import annotations

import pytest
import torch

from tests.gpu.device import DEVICE, KERNELS, ON_DEVICE, a_row, policy_on, relative
from tests.support.student_models import FAMILIES

pytestmark = ON_DEVICE


def measured(
    device: torch.device, family: str, dtype: str, *, grouped: bool, rounded: str
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probabilities of the row's response tokens, and the gradient of a weighted sum of them; CPU, float32."""
    policy, row = policy_on(device, family, dtype, grouped=grouped, rounded=rounded), a_row().to(device)
    logprobs_S = policy(row).logprobs_S
    weights_S = torch.linspace(-1.0, 1.0, len(logprobs_S), device=device)
    (logprobs_S * weights_S).sum().backward()
    gradients = {n: p.grad.float().cpu() for n, p in policy.named_parameters() if p.grad is not None}
    return logprobs_S.detach().cpu(), gradients


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_in_bfloat16_are_as_good_as_plain_ones(
    family: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    KERNELS[kernel](monkeypatch)
    want_S, want = measured(torch.device("cpu"), family, "float32", grouped=False, rounded="bfloat16")
    plain_S, plain = measured(DEVICE, family, "bfloat16", grouped=False, rounded="bfloat16")
    packed_S, packed = measured(DEVICE, family, "bfloat16", grouped=True, rounded="bfloat16")
    assert float((packed_S - want_S).abs().mean()) <= 2 * float((plain_S - want_S).abs().mean()) + 0.01
    assert relative(packed, want) <= 2 * relative(plain, want) + 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_in_float32(family: str) -> None:
    want_S, want = measured(torch.device("cpu"), family, "float32", grouped=False, rounded="float32")
    packed_S, packed = measured(DEVICE, family, "float32", grouped=True, rounded="float32")
    torch.testing.assert_close(packed_S, want_S, atol=1e-4, rtol=0)
    assert relative(packed, want) <= 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_flash_attention_equals_ours(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kernels of one formula in bfloat16: each rounds its output once a layer."""
    with monkeypatch.context() as patch:
        KERNELS["flash"](patch)
        flash_S, flash = measured(DEVICE, family, "bfloat16", grouped=True, rounded="bfloat16")
    with monkeypatch.context() as patch:
        KERNELS["sdpa"](patch)
        sdpa_S, sdpa = measured(DEVICE, family, "bfloat16", grouped=True, rounded="bfloat16")
    assert float((flash_S - sdpa_S).abs().mean()) <= 0.05
    assert relative(flash, sdpa) <= 0.1
