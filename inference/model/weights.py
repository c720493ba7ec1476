"""Weights: each rank reads only its own slices of the (sharded) safetensors, straight into the Megatron model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from inference.model.families import Architecture, Family, Weight
from inference.model.files import Checkpoint


def padded(size: int, tensor_parallel: int) -> int:
    """The next multiple of `tensor_parallel`."""
    return -(-size // tensor_parallel) * tensor_parallel


def kv_groups(architecture: Architecture, tensor_parallel: int) -> int:
    """KV heads after repeating: the fewest that both the checkpoint's KV heads and the ranks divide.

    Both divide the attention heads, so this does too.
    """
    return math.lcm(architecture.kv_heads, tensor_parallel)


def open_slice(checkpoint: Checkpoint, name: str) -> Any:
    """A lazy slice of one tensor (`Stored.rows`), in float32 where it is quantised."""
    values, scales = checkpoint.tensors[checkpoint.find(name)], checkpoint.tensors.get(name + "_scale_inv")
    found = values.rows(checkpoint.find(name))
    if scales is None or checkpoint.blocks is None:
        return found
    factors = scales.rows(name + "_scale_inv")[:].float()
    return _Scaled(found, factors, checkpoint.blocks)


@dataclass(frozen=True)
class _Scaled:
    """A lazy slice of a float8 matrix whose blocks have one factor each; what it gives is float32."""

    values: Any
    factors: torch.Tensor
    blocks: tuple[int, int]

    def get_shape(self) -> list[int]:
        """Of the matrix."""
        return self.values.get_shape()

    def __getitem__(self, key: slice | tuple[slice, slice]) -> torch.Tensor:
        keys = key if isinstance(key, tuple) else (key, slice(None))
        places = [torch.arange(*k.indices(n)) // b for k, n, b in zip(keys, self.get_shape(), self.blocks, strict=True)]
        return self.values[key].float() * self.factors[places[0]][:, places[1]]


@dataclass(frozen=True)
class Cut:
    """Which part of a model is loaded."""

    architecture: Architecture
    rank: int
    size: int
    """Tensor-parallel ranks."""


@torch.no_grad()
def load_weights(model: torch.nn.Module, checkpoint: Checkpoint, family: Family, cut: Cut) -> None:
    """Fill every parameter of this rank's model; raises if one has no source."""
    parameters = dict(model.named_parameters())
    for target, sources, weight in checkpoint.parameters(family, cut.architecture):
        slices = [open_slice(checkpoint, source) for source in sources]
        _Filler(parameters.pop(target).data, slices, weight, cut).fill()
    if parameters:
        raise ValueError(f"no weights for {', '.join(sorted(parameters))}")


class _Filler:
    """Copies one parameter's slices into place. Padding (vocabulary, MLP width) is zero and changes nothing."""

    def __init__(self, out: torch.Tensor, slices: list[Any], weight: Weight, cut: Cut) -> None:
        self.out, self.slices, self.weight = out, slices, weight
        self.architecture, self.rank, self.size = cut.architecture, cut.rank, cut.size

    def fill(self) -> None:
        """Dispatch on how the parameter is cut."""
        shard, a, first = self.weight.shard, self.architecture, self.slices[0]
        if shard in ("replicated", "norm"):
            value = first[:]
            if self.out.shape != value.shape:
                raise ValueError(self._wrong(f"shape {list(value.shape)}", list(self.out.shape)))
            self.out.copy_(value)
            if shard == "norm" and a.norm_offset:
                self.out.add_(a.norm_offset)
        elif shard == "row":
            self._part(self.out, first, self._length(first, 1), 1)
        elif shard in ("qkv", "fused_qkv"):
            self._qkv()
        else:
            total = a.vocab_size if shard == "vocab" else a.ffn_size
            for out, source in zip(self.out.chunk(len(self.slices)), self.slices, strict=True):
                if self._length(source, 0) < total:
                    raise ValueError(self._wrong(f"{self._length(source, 0)} rows", total))
                self._part(out, source, total, 0)

    def _wrong(self, found: str, wanted: Any) -> str:
        return f"{self.weight.sources[0]}: {found}, but config.json says {wanted}"

    def _read(self, source: Any, start: int, stop: int, dim: int) -> torch.Tensor:
        """Rows (dim 0) or columns (dim 1) start..stop of a source as [out, in], whichever way the file holds them."""
        part = source[start:stop] if (dim == 0) != self.weight.transposed else source[:, start:stop]
        return part.T if self.weight.transposed else part

    def _length(self, source: Any, dim: int) -> int:
        return source.get_shape()[1 - dim if self.weight.transposed else dim]

    def _part(self, out: torch.Tensor, source: Any, total: int, dim: int) -> None:
        """This rank's share of the first `total` rows (dim 0) or columns (dim 1) of a source; zero beyond them."""
        width = out.shape[dim]
        start = min(self.rank * width, total)
        stop = min(start + width, total)
        if stop > start:
            out.narrow(dim, 0, stop - start).copy_(self._read(source, start, stop, dim))
        out.narrow(dim, stop - start, width - (stop - start)).zero_()

    def _qkv(self) -> None:
        """Rows ordered by KV group: [queries of the group, key, value]; KV heads repeat where ranks outnumber them."""
        architecture = self.architecture
        groups, size = kv_groups(architecture, self.size), architecture.head_dim
        queries = architecture.heads // groups * size
        repeat = groups // architecture.kv_heads
        sources, offsets = self.slices, [0, 0, 0]
        if self.weight.shard == "fused_qkv":
            sources = self.slices * 3
            offsets = [0, architecture.heads * size, 2 * architecture.heads * size]
        local = groups // self.size
        for slot, group in enumerate(range(self.rank * local, (self.rank + 1) * local)):
            row = slot * (queries + 2 * size)
            for source, offset, first, count in zip(
                sources, offsets, (group * queries, *[group // repeat * size] * 2), (queries, size, size), strict=True
            ):
                start = offset + first
                self.out[row : row + count].copy_(self._read(source, start, start + count, 0))
                row += count
