"""Products of few rows on the CPU: a decoding step has one row a response, which MKL multiplies at a tenth of its best.

oneDNN, with the weights in a layout of its own, is 2 to 5 times faster there (docs/benchmarks.md). That is a copy of
them, so it is made when sampling starts and let go when it ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

MOST_ROWS = 64
"""With more rows torch's own product is as fast."""
LEAST_WEIGHTS = 1 << 16
"""Smaller matrices gain less than the copy costs."""
_OPERATORS = ("_linear_pointwise", "_reorder_linear_weight")


@contextmanager
def few_rows(model: nn.Module, rows: int) -> Iterator[None]:
    """While open, the model's linear layers multiply up to MOST_ROWS rows through oneDNN, without gradients.

    `rows` a step, for which the layout is chosen. Layers that it does not take (another device, ZeRO 3's partitions,
    quantised or adapted layers themselves) stay as they are.
    """
    layers: list[Any] = [m for m in model.modules() if _taken(m)] if 0 < rows <= MOST_ROWS and _available() else []
    for layer in layers:
        packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
        layer.forward = partial(_product, layer, packed)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own again


def _available() -> bool:
    """oneDNN's operators are torch's own, for its compiler; where a version lacks them, nothing changes."""
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in _OPERATORS)


def _bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _taken(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    weight = module.weight
    # oneDNN refuses bfloat16 on processors without its instructions (AVX-512 or AVX-NE-CONVERT).
    known = weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and _bfloat16())
    return weight.device.type == "cpu" and known and not hasattr(weight, "ds_id") and weight.numel() >= LEAST_WEIGHTS


def _product(layer: Any, packed: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled() or rows.shape[:-1].numel() > MOST_ROWS:
        return F.linear(rows, layer.weight, layer.bias)
    flat = rows.reshape(-1, rows.shape[-1])
    out = torch.ops.mkldnn._linear_pointwise(flat, packed, layer.bias, "none", [], "")
    return out.view(*rows.shape[:-1], -1)
