"""The trainer's own ranks: who am I, sums over all ranks, strings of all ranks. No object collectives."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
DistError = dist.DistError
"""What a store raises whose server has gone."""
NOT_MET = (dist.DistStoreError, dist.DistNetworkError)
"""What is raised where ranks do not meet."""
_beats = 0


def beat() -> None:
    """Say that this process gets on; every collective of this module says so when it is left."""
    global _beats
    _beats += 1


def beats() -> int:
    """How often it was said (training/run/watchdog.py looks)."""
    return _beats


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this rank writes files and shows progress."""
    return rank() == 0


def device() -> torch.device:
    """Where tensors have to be for a collective."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Element-wise sum of a small tensor over all ranks, on the CPU."""
    return _reduced(values, dist.ReduceOp.SUM)


def sum_in_place(values: torch.Tensor) -> torch.Tensor:
    """Element-wise sum of a tensor over all ranks, where it is; overwrites it."""
    if world_size() > 1:
        dist.all_reduce(values)
        beat()
    return values


def max_over_ranks(value: float) -> float:
    """Largest of one number over all ranks."""
    return float(_reduced(torch.tensor(value, dtype=torch.float64), dist.ReduceOp.MAX))


def _reduced(values: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> torch.Tensor:
    if world_size() == 1:
        return values
    moved = values.to(device(), copy=True)
    dist.all_reduce(moved, op=operation)
    found = moved.cpu()
    beat()
    return found


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    return max_over_ranks(float(flag)) > 0


def together(work: Callable[[], T], error: type[Exception]) -> T:
    """What `work` returns; an `error` that it raises on one rank is raised, as the first one said it, on every rank.
    Collective."""
    problem = None
    try:
        result = work()
    except error as raised:
        problem = str(raised)
    if any_rank(problem is not None):
        raise error(next(filter(None, gather_strings([problem or ""])), error.__name__))
    return result


def sum_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Sum of each number over all ranks; every rank has the same keys."""
    keys = sorted(sums)
    total = sum_over_ranks(torch.tensor([sums[k] for k in keys], dtype=torch.float64))
    return dict(zip(keys, total.tolist(), strict=True))


def by_main(work: Callable[[], T]) -> T | None:
    """What `work` returns, which rank 0 does alone; None elsewhere. The others wait for hours, if it takes them, and
    hear signals: any other collective gives up on a rank that is late. Collective."""
    patient = side_group()
    result = work() if is_main() else None
    if patient is not None and (arriving := dist.barrier(patient, async_op=True)) is not None:
        while not arriving.is_completed():
            time.sleep(0.05)
        arriving.wait()
        beat()
    return result


def side_group() -> dist.ProcessGroup | None:
    """All ranks once more, over gloo, for what goes on beside the other collectives and takes as long as it takes; None
    for one rank. Collective."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=1)) if world_size() > 1 else None


def gather_strings(texts: Sequence[str], group: dist.ProcessGroup | None = None) -> list[str]:
    """All ranks' strings in rank order, as JSON over the wire (nothing is unpickled)."""
    if world_size() == 1:
        return list(texts)
    where = device() if group is None else torch.device("cpu")
    body = bytearray(json.dumps(list(texts)).encode())
    lengths = [torch.zeros(1, dtype=torch.int64, device=where) for _ in range(world_size())]
    dist.all_gather(lengths, torch.tensor([len(body)], dtype=torch.int64, device=where), group=group)
    sizes = [int(length.item()) for length in lengths]
    padded = torch.frombuffer(body.ljust(max(sizes)), dtype=torch.uint8).to(where)
    parts = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    if group is None:
        beat()
    raw = [bytes(part[:size].tolist()) for part, size in zip(parts, sizes, strict=True)]
    return [text for one in raw for text in json.loads(one)]


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()
        beat()
