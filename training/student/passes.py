"""Forward passes over a batch: packed, within a token budget, in step with the other ranks, given back flat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from inference.attention.packing import Group, PackedRow, in_batch_order, pack, pack_row
from training import distributed


@dataclass
class Passes:
    """How packed rows reach one model."""

    tokens: int
    """Most packed tokens of a pass."""
    device: torch.device
    """Where the model is."""


def each_token(passes: Passes, groups: Sequence[Group], one: Callable[[PackedRow], torch.Tensor]) -> torch.Tensor:
    """What `one` says of each response token: [S, ...] in batch order, on the CPU, without a gradient.

    `one` is given packed rows on the model's device and returns [S, ...] for the row's tokens. Collective.
    """
    rows = rows_in_step(groups, passes.tokens)
    with torch.no_grad():
        found = []
        for row in rows:
            found.append(one(row.to(passes.device)).cpu())
            distributed.beat()  # many rows of a long text may take longer than the watchdog waits
        return in_batch_order(rows, found)


def rows_in_step(groups: Sequence[Group], max_tokens: int) -> list[PackedRow]:
    """The groups packed into rows, and as many spare rows as the rank with most rows has more. Collective.

    Under ZeRO 3 every pass is a collective: ranks with unequal numbers of passes would wait for each other for ever.
    A spare row is one prompt token without a response: it costs next to nothing, adds nothing to a sum over response
    tokens, and reads no tensor of the batch, of which a rank may have none (all its groups dropped).
    """
    rows = pack(groups, max_tokens)
    missing = int(distributed.max_over_ranks(len(rows))) - len(rows)
    return rows + [pack_row([Group(prompt=(0,), responses=())])] * missing
