"""Packing: a prompt is computed once for all of its responses.

A group is laid out as `[prompt | response 1 | response 2 | ... ]`; several groups fill one row of T tokens. Positions
restart after the prompt. The last token of a response predicts nothing, so it is not an input: a response of R tokens
adds R - 1 inputs, and its first token is predicted by the last prompt token, which all responses of the group share.
The one-position shift between inputs and predictions lives here (`predict_S`) and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")


@dataclass(frozen=True)
class Group:
    """One prompt with its responses, as token ids. `first_response` numbers its responses within the batch."""

    prompt: tuple[int, ...]
    """P >= 1 token ids."""
    responses: tuple[tuple[int, ...], ...]
    """Token ids of each response; a response may be empty, and there may be none (prefill)."""
    first_response: int = 0
    """Batch index b of the first response; the others follow."""

    @property
    def input_tokens(self) -> int:
        """Tokens that this group takes in a packed row."""
        return len(self.prompt) + sum(max(len(response) - 1, 0) for response in self.responses)

    @property
    def response_tokens(self) -> int:
        return sum(len(response) for response in self.responses)


@dataclass(frozen=True)
class PackedRow:
    """Groups laid end to end. S counts the response tokens, in the order of the batch index b, then of t."""

    tokens_T: torch.Tensor
    """int64 [T] token ids."""
    positions_T: torch.Tensor
    """int64 [T] position of each token in its own sequence."""
    segments_T: torch.Tensor
    """int64 [T] 0 in the prompt, g in response g of the token's group."""
    group_lengths: tuple[int, ...]
    """Tokens of each group; they sum to T."""
    predict_S: torch.Tensor
    """int64 [S] index into the row of the position whose output predicts each response token."""
    labels_S: torch.Tensor
    """int64 [S] the response tokens."""
    response_S: torch.Tensor
    """int64 [S] batch index b of each response token."""
    place_S: torch.Tensor
    """int64 [S] place of each response token among those of all groups that were packed, in their order."""

    def to(self, device: torch.device | str) -> PackedRow:
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **moved)


def pack_row(groups: Sequence[Group], first_tokens: Sequence[int] | None = None) -> PackedRow:
    """Lay the groups into one row. `first_tokens`: the place of each one's first response token among those of the
    batch; in this row by default."""
    if first_tokens is None:
        first_tokens = first_places(groups)
    tokens, positions, segments, lengths = (list[int]() for _ in range(4))
    predict, labels, response_index, place = (list[int]() for _ in range(4))
    for group, first in zip(groups, first_tokens, strict=True):
        prompt, start = len(group.prompt), len(tokens)
        tokens.extend(group.prompt)
        positions.extend(range(prompt))
        segments.extend([0] * prompt)
        for g, response in enumerate(group.responses):
            if response:
                inputs = response[:-1]
                predict.extend([start + prompt - 1, *range(len(tokens), len(tokens) + len(inputs))])
                tokens.extend(inputs)
                positions.extend(range(prompt, prompt + len(inputs)))
                segments.extend([g + 1] * len(inputs))
                labels.extend(response)
                response_index.extend([group.first_response + g] * len(response))
        place.extend(range(first, first + group.response_tokens))
        lengths.append(len(tokens) - start)
    return PackedRow(
        tokens_T=torch.tensor(tokens, dtype=torch.int64),
        positions_T=torch.tensor(positions, dtype=torch.int64),
        segments_T=torch.tensor(segments, dtype=torch.int64),
        group_lengths=tuple(lengths),
        predict_S=torch.tensor(predict, dtype=torch.int64),
        labels_S=torch.tensor(labels, dtype=torch.int64),
        response_S=torch.tensor(response_index, dtype=torch.int64),
        place_S=torch.tensor(place, dtype=torch.int64),
    )


def pack(groups: Sequence[Group], max_tokens: int) -> list[PackedRow]:
    """Fill rows of at most `max_tokens` tokens, longest group first; a longer single group gets a row of its own."""
    order = sorted(range(len(groups)), key=lambda i: (-groups[i].input_tokens, i))
    first, rows = first_places(groups), within(order, lambda i: groups[i].input_tokens, max_tokens)
    return [pack_row([groups[i] for i in row], [first[i] for i in row]) for row in rows]


def within(items: Iterable[Item], cost: Callable[[Item], int], budget: int) -> list[list[Item]]:
    """The items in their order, in batches that cost at most `budget` each; one that costs more is by itself."""
    batches: list[list[Item]] = []
    used = 0
    for item in items:
        if not batches or used + cost(item) > budget:
            batches.append([])
            used = 0
        batches[-1].append(item)
        used += cost(item)
    return batches


def first_places(groups: Sequence[Group]) -> list[int]:
    """Place of each group's first response token among those of all groups, in their order."""
    counts = [group.response_tokens for group in groups]
    return [end - count for end, count in zip(accumulate(counts), counts, strict=True)]


def in_batch_order(rows: Sequence[PackedRow], values: Sequence[torch.Tensor]) -> torch.Tensor:
    """What each row says of its response tokens, [S, ...] a row, as one [S, ...] in the order of what was packed."""
    if not rows:
        return torch.zeros(0)
    joined = torch.cat(list(values))
    out = torch.empty_like(joined)
    out[torch.cat([row.place_S for row in rows]).to(joined.device)] = joined
    return out


def groups_of(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], group_size: int) -> list[Group]:
    """N prompts and B = N * group_size responses, ordered by prompt, as groups."""
    if len(responses) != len(prompts) * group_size:
        raise ValueError(f"{len(responses)} responses do not make {len(prompts)} groups of {group_size}")
    return [
        Group(
            prompt=tuple(prompt),
            responses=tuple(tuple(r) for r in responses[n * group_size : (n + 1) * group_size]),
            first_response=n * group_size,
        )
        for n, prompt in enumerate(prompts)
    ]
