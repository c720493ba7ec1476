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
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one block that are given the same rows: one product makes what all of them give."""
_OPERATORS = ("_linear_pointwise", "_reorder_linear_weight")


@contextmanager
def few_rows(model: nn.Module, rows: int) -> Iterator[None]:
    """While open, the model's linear layers multiply up to MOST_ROWS rows through oneDNN, without gradients.

    `rows` a step, for which the layout is chosen. Layers that it does not take (another device, ZeRO 3's partitions,
    quantised or adapted layers themselves) stay as they are.
    """
    layers: list[Any] = [m for m in model.modules() if _taken(m)] if 0 < rows <= MOST_ROWS and _available() else []
    left = dict.fromkeys(layers)
    for module in model.modules():
        for names in TOGETHER:
            found = [getattr(module, name, None) for name in names]
            if all(one in left for one in found) and len({(one.bias is None) for one in found if one}) == 1:
                _Product(found, rows)
                for one in found:
                    del left[one]
    for layer in left:
        _Product([layer], rows)
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


class _Product:
    """The product of some layers with the same rows; takes the place of their own."""

    def __init__(self, layers: list[Any], rows: int) -> None:
        weights, biases = [one.weight.detach() for one in layers], [one.bias for one in layers]
        self._packed = torch.ops.mkldnn._reorder_linear_weight(
            weights[0] if len(weights) == 1 else torch.cat(weights), rows
        )
        self._bias = None if biases[0] is None else torch.cat([bias.detach() for bias in biases])
        self._sizes = [len(weight) for weight in weights]
        self._rows: torch.Tensor | None = None
        """Whose product `_made` is, until the last layer has asked for its part."""
        self._made: tuple[torch.Tensor, ...] = ()
        for place, layer in enumerate(layers):
            layer.forward = partial(self._of, layer, place)

    def _of(self, layer: Any, place: int, rows: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() or rows.shape[:-1].numel() > MOST_ROWS:
            return F.linear(rows, layer.weight, layer.bias)
        if rows is not self._rows:
            flat = rows.reshape(-1, rows.shape[-1])
            out = torch.ops.mkldnn._linear_pointwise(flat, self._packed, self._bias, "none", [], "")
            self._rows, self._made = rows, out.view(*rows.shape[:-1], -1).split(self._sizes, -1)
        if place + 1 == len(self._sizes):
            self._rows = None
        return self._made[place]
