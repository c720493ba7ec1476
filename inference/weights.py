"""Weights: each rank reads only its own slices of the (sharded) safetensors, straight into the Megatron model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from inference.checks import safetensors_files
from inference.families import Architecture, Family, Weight


def padded(size: int, tensor_parallel: int) -> int:
    """The next multiple of `tensor_parallel`."""
    return -(-size // tensor_parallel) * tensor_parallel


def kv_groups(architecture: Architecture, tensor_parallel: int) -> int:
    """KV heads after repeating: the fewest that both the checkpoint's KV heads and the ranks divide.

    Both divide the attention heads, so this does too.
    """
    return math.lcm(architecture.kv_heads, tensor_parallel)


class Checkpoint:
    """The tensors of a model directory, by name, read lazily."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.file_of: dict[str, Path] = {}
        for file in safetensors_files(path):
            with safe_open(str(file), framework="pt") as handle:
                self.file_of |= dict.fromkeys(handle.keys(), file)

    def __contains__(self, name: str) -> bool:
        return name in self.file_of

    def slice(self, name: str) -> Any:
        """A lazy slice of one tensor: indexing it reads only that part.

        Each has a mapping of its own: what was read counts as this process's memory until the mapping goes.
        """
        if name not in self:
            raise ValueError(f"{self._path}: no tensor {name!r} in its safetensors")
        return safe_open(str(self.file_of[name]), framework="pt").get_slice(name)

    def prefix(self, family: Family) -> str:
        """What stands before the family's tensor names in this checkpoint."""
        first = family.weights[0].sources[0]
        for prefix in family.prefixes:
            if prefix + first in self:
                return prefix
        raise ValueError(
            f"{self._path}: no tensor named {' or '.join(repr(prefix + first) for prefix in family.prefixes)}"
        )

    def output_name(self, family: Family, architecture: Architecture) -> str:
        """Name of the output layer's tensor: its own, or the embedding where the two are tied."""
        if architecture.tied:
            return self.prefix(family) + family.weights[0].sources[0]
        for name in family.output:
            if name in self:
                return name
        raise ValueError(f"{self._path}: no tensor named {' or '.join(map(repr, family.output))}")


@torch.no_grad()
def load_weights(
    model: torch.nn.Module,
    checkpoint: Checkpoint,
    family: Family,
    architecture: Architecture,
    *,
    rank: int,
    tensor_parallel: int,
) -> None:
    """Fill every parameter of this rank's model; raises if one has no source."""
    parameters = dict(model.named_parameters())
    prefix = checkpoint.prefix(family)
    for weight in _with_output(family, architecture, checkpoint, prefix):
        for target, sources in _by_layer(weight, len(architecture.layers)):
            parameter = parameters.pop(target)
            slices = [checkpoint.slice(source) for source in sources]
            _Filler(parameter.data, slices, weight, architecture, rank, tensor_parallel).fill()
    if parameters:
        raise ValueError(f"no weights for {', '.join(sorted(parameters))}")


def _with_output(family: Family, architecture: Architecture, checkpoint: Checkpoint, prefix: str) -> Iterator[Weight]:
    """The family's table with full names, and the output layer where it is not the embedding."""
    for weight in family.weights:
        yield Weight(
            weight.target, tuple(prefix + source for source in weight.sources), weight.shard, weight.transposed
        )
    if not architecture.tied:
        yield Weight("output_layer.weight", (checkpoint.output_name(family, architecture),), "vocab")


def _by_layer(weight: Weight, layers: int) -> Iterator[tuple[str, list[str]]]:
    """(parameter, sources) for each layer, or once for a weight outside the layers."""
    if "{i}" not in weight.target:
        yield weight.target, list(weight.sources)
        return
    for i in range(layers):
        yield weight.target.replace("{i}", str(i)), [source.replace("{i}", str(i)) for source in weight.sources]


class _Filler:
    """Copies one parameter's slices into place. Padding (vocabulary, MLP width) is zero and changes nothing."""

    def __init__(
        self,
        out: torch.Tensor,
        slices: list[Any],
        weight: Weight,
        architecture: Architecture,
        rank: int,
        tensor_parallel: int,
    ) -> None:
        self.out, self.slices, self.weight = out, slices, weight
        self.architecture, self.rank, self.size = architecture, rank, tensor_parallel

    def fill(self) -> None:
        """Dispatch on how the parameter is cut."""
        shard = self.weight.shard
        if shard in ("replicated", "norm"):
            value = self.slices[0][:]
            self._check(self.out.shape, value.shape)
            self.out.copy_(value)
            if shard == "norm" and self.architecture.norm_offset:
                self.out.add_(self.architecture.norm_offset)
        elif shard == "row":
            self._columns()
        elif shard in ("qkv", "fused_qkv"):
            self._qkv()
        else:
            parts = self.out.chunk(len(self.slices))
            for part, source in zip(parts, self.slices, strict=True):
                self._rows(part, source)

    def _read(self, source: Any, start: int, stop: int, *, columns: bool = False) -> torch.Tensor:
        """Rows (or columns) start..stop of a source as [out, in], whichever way the file holds them."""
        if self.weight.transposed:
            return (source[start:stop] if columns else source[:, start:stop]).T
        return source[:, start:stop] if columns else source[start:stop]

    def _length(self, source: Any, *, columns: bool = False) -> int:
        shape = source.get_shape()
        return shape[1 if columns != self.weight.transposed else 0]

    def _check(self, want: torch.Size, got: torch.Size) -> None:
        if want != got:
            raise ValueError(f"{self.weight.sources[0]}: shape {list(got)}, but config.json says {list(want)}")

    def _rows(self, part: torch.Tensor, source: Any) -> None:
        """This rank's rows of a source; rows past its end are zero."""
        total = {"vocab": self.architecture.vocab_size}.get(self.weight.shard, self.architecture.ffn_size)
        if self._length(source) < total:
            raise ValueError(f"{self.weight.sources[0]}: {self._length(source)} rows, but config.json says {total}")
        rows = part.shape[0]
        start = min(self.rank * rows, total)
        stop = min(start + rows, total)
        if stop > start:
            part[: stop - start].copy_(self._read(source, start, stop))
        part[stop - start :].zero_()

    def _columns(self) -> None:
        source, width = self.slices[0], self.out.shape[1]
        total = self._length(source, columns=True)
        start = min(self.rank * width, total)
        stop = min(start + width, total)
        if stop > start:
            self.out[:, : stop - start].copy_(self._read(source, start, stop, columns=True))
        self.out[:, stop - start :].zero_()

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
                self.out[row : row + count].copy_(self._read(source, start, start + count))
                row += count
