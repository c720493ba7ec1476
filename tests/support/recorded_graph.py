"""A CUDA graph for the CPU: the operations of a function are written down once, and played again on the same tensors.

Like a graph it keeps whatever Python knew at the time (numbers, shapes, which tensors), refuses operations that wait
for the device, and leaves no trace of the capture itself: what it wrote is put back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "repeat_interleave"}
"""Operations whose result the host has to know."""


class Refused(RuntimeError):
    """What CUDA says of an operation that no graph can hold."""


def recorded(function: Callable[[], None]) -> Callable[[], None]:
    """In place of `graph_decoder.captured`."""
    with mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True), _Recorder() as recorder:
        function()
    recorder.put_back()
    return recorder.play


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[torch.Tensor]]] = []
        self._made: set[int] = set()
        """Storages of the recording's own."""
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """What others had in them, by storage."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(t.dtype == torch.bool for t in args[1] if t is not None)
        if name in WAITS or by_mask:
            raise Refused(f"operation not permitted when stream is capturing: {name}")
        inputs = _tensors((args, kwargs))
        written = [
            value
            for place, one in enumerate(func._schema.arguments)
            if one.alias_info is not None and one.alias_info.is_write
            for value in _tensors(kwargs.get(one.name) if one.kwarg_only else args[place : place + 1])
        ]
        for tensor in written:
            key = _storage(tensor)
            if key not in self._made and key not in self._before:
                whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
                self._before[key] = (whole, whole.clone())
        out = func(*args, **kwargs)
        known = {_storage(t) for t in inputs}
        fresh = [t if _storage(t) not in known else None for t in _tensors(out)]
        self._made |= {_storage(t) for t in fresh if t is not None}
        self._calls.append((func, args, kwargs, fresh))
        return out

    def put_back(self) -> None:
        """As if the recording had not run."""
        for now, before in self._before.values():
            now.copy_(before)

    def play(self) -> None:
        """All operations again, each result into the tensor that held it."""
        for func, args, kwargs, fresh in self._calls:
            for kept, again in zip(fresh, _tensors(func(*args, **kwargs)), strict=True):
                if kept is not None:
                    kept.copy_(again)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
