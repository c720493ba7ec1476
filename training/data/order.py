"""Which items come in which step, and which random numbers belong to what: pure functions of the step, so that resuming
needs no cursor and the number of ranks changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch

from training import distributed

Item = TypeVar("Item")


def random_stream(*numbers: int) -> torch.Generator:
    """A generator that belongs to these numbers (seed, step, prompt, ...), whoever draws from it, and when."""
    mixed = 0
    for number in numbers:
        # splitmix64: neighbouring seeds, steps and prompts give unrelated streams.
        mixed = (mixed + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return torch.Generator().manual_seed(mixed & 0x7FFFFFFFFFFFFFFF)


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) & 0x7FFFFFFFFFFFFFFF)
    return torch.randperm(size, generator=generator)


def positions_of_step(step: int, count: int, size: int, seed: int) -> list[int]:
    """The `count` items that step `step` takes from `size` items, shuffled anew each epoch; no item is left out.

    A pure function, so resuming needs no cursor and skips nothing at an epoch's end.
    """
    return [int(_permutation(seed, i // size, size)[i % size]) for i in range(step * count, (step + 1) * count)]


def replacement_positions(slots: Sequence[int], size: int, seed: int, step: int, attempt: int) -> list[int]:
    """An item for each slot of a step whose own item taught nothing; `attempt` counts the tries. Drawn by slot, so that
    the number of ranks changes nothing."""
    return [int(torch.randint(size, (1,), generator=random_stream(seed, step, attempt, slot))) for slot in slots]


def items_of_step(items: Sequence[Item], count: int, step: int, seed: int) -> list[Item]:
    """This rank's share of the `count` items that step `step` takes; none where there are no items."""
    if not items:
        return []
    chosen = positions_of_step(step, count, len(items), seed)
    return [items[i] for i in share_of_rank(chosen, distributed.rank(), distributed.world_size())]


def share_of_rank(items: Sequence[Any], rank: int, world: int) -> list[Any]:
    """This rank's contiguous share; shares differ by at most one item."""
    start, end = len(items) * rank // world, len(items) * (rank + 1) // world
    return [items[place] for place in range(start, end)]
