"""A packed row undone, for models that grouped attention does not reach."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from inference.attention.packing import PackedRow


@dataclass(frozen=True)
class PlainRows:
    """A packed row undone: B sequences, each with a prompt of its own, right-padded to L tokens."""

    tokens_BL: torch.Tensor
    """int64 [B, L]."""
    mask_BL: torch.Tensor
    """int64 [B, L] 1 on real tokens."""
    sequence_S: torch.Tensor
    """int64 [S] sequence that predicts each response token of the packed row."""
    place_S: torch.Tensor
    """int64 [S] place in that sequence."""


def plain_rows(row: PackedRow) -> PlainRows:
    """Every response of a packed row behind its own copy of the prompt, for models that cannot be packed.

    A row without responses becomes its prompts alone, so that a pass is a pass on every rank.
    """
    segments, predict, owner = row.segments_T.tolist(), row.predict_S.tolist(), row.response_S.tolist()
    prompts, group_of_T, start = [], [], 0
    for number, length in enumerate(row.group_lengths):
        prompts.append([i for i in range(start, start + length) if segments[i] == 0])
        group_of_T += [number] * length
        start += length
    members: list[list[int]] = []
    sequence, place = [], []
    for s, i in enumerate(predict):
        prompt = prompts[group_of_T[i]]
        if s == 0 or owner[s] != owner[s - 1]:
            members.append(list(prompt))
        else:
            members[-1].append(i)
        sequence.append(len(members) - 1)
        place.append(len(members[-1]) - 1)
    members = members or prompts
    longest = max(len(one) for one in members)
    index = torch.tensor([one + [one[0]] * (longest - len(one)) for one in members])
    lengths = torch.tensor([len(one) for one in members])
    device = row.tokens_T.device
    return PlainRows(
        tokens_BL=row.tokens_T[index.to(device)],
        mask_BL=(torch.arange(longest)[None, :] < lengths[:, None]).long().to(device),
        sequence_S=torch.tensor(sequence, dtype=torch.int64, device=device),
        place_S=torch.tensor(place, dtype=torch.int64, device=device),
    )
