"""Padded blocks of a packed row: what attention computes at a time (inference/attention/packed.py).

Shapes: T tokens in the row, H query heads, H_kv key-value heads (H_kv divides H), D head size; N groups of a block, G
responses of a group, r tokens of a response and P of a prompt, both padded on the right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from inference.attention.grouped import ScoreRule
from inference.attention.packing import PackedRow
from inference.attention.prompt_cache import SharedPromptAttention


class _Slots:
    """A padded block: lists of row indices, filled up to one length."""

    def __init__(self, lists: list[list[int]], fill: list[int], device: torch.device) -> None:
        """`fill`: what pads each list. It is a token of the list's own group: nothing of a padded slot is kept, so no
        gradient reaches that token through it, and a NaN stays in its group (softmax weight 0 times NaN is NaN)."""
        longest = max(len(one) for one in lists)
        flat = [i for one, pad in zip(lists, fill, strict=True) for i in (*one, *[pad] * (longest - len(one)))]
        self.shape = (len(lists), longest)
        self.full = all(len(one) == longest for one in lists)
        self._start = flat[0] if flat == list(range(flat[0], flat[0] + len(flat))) else None
        self._index = torch.tensor(flat, dtype=torch.int64, device=device)
        self.tokens = [i for one in lists for i in one]
        """Row indices of what is real, in order."""
        self.lengths = torch.tensor([len(one) for one in lists], device=device)
        # Not a mask: indexing with one waits for the device, in each layer, forward and backward.
        kept = [n * longest + i for n, one in enumerate(lists) for i in range(len(one))]
        self._kept = torch.tensor(kept, dtype=torch.int64, device=device)

    def take(self, row_THD: torch.Tensor) -> torch.Tensor:
        """[lists, longest, H, D]: a view where the block is a slice of the row, else gathered."""
        length = len(self._index)
        flat = row_THD.index_select(0, self._index) if self._start is None else row_THD.narrow(0, self._start, length)
        return flat.view(*self.shape, *row_THD.shape[1:]) if flat.is_contiguous() else flat.unflatten(0, self.shape)

    def real(self, block: torch.Tensor) -> torch.Tensor:
        """[lists, longest, H, D] without its padding: [tokens, H, D]."""
        return block.flatten(0, 1) if self.full else block.flatten(0, 1).index_select(0, self._kept)


Part = tuple[list[int], list[list[int]]]
"""Row indices of a group's prompt, and of each of its responses that has inputs."""


def parts_of(row: PackedRow) -> list[Part]:
    """The groups of a row."""
    segments, start, parts = row.segments_T.tolist(), 0, []
    for length in row.group_lengths:
        members: dict[int, list[int]] = {}
        for i in range(start, start + length):
            members.setdefault(segments[i], []).append(i)
        parts.append((members.pop(0), list(members.values())))
        start += length
    return parts


BLOCK_START = {"cpu": 1 << 13}
"""Scores of a head that take as long as what a block more starts (measured forward and backward, two layers of four
heads); on a device it is the launches, and a guess."""


@dataclass(frozen=True)
class _Shape:
    """Groups of one padded block."""

    groups: int
    members: int
    prompt: int
    response: int

    @property
    def scores(self) -> int:
        """Of one head, padding included."""
        own = self.members * self.response * (self.prompt + self.response)
        return self.groups * (self.prompt * self.prompt + own)

    def __add__(self, other: _Shape) -> _Shape:
        longest = (max(getattr(self, n), getattr(other, n)) for n in ("members", "prompt", "response"))
        return _Shape(self.groups + other.groups, *longest)


def alike(parts: list[Part], device: torch.device) -> list[list[Part]]:
    """The groups of each block: those of similar lengths, so that short answers are not padded to long ones.

    Prompts and responses that stay below the same powers of two are together; then the two blocks that cost least
    together are one, as long as that costs less than to start both.
    """
    blocks: dict[tuple[int, int], tuple[_Shape, list[Part]]] = {}
    for prompt, responses in parts:
        shape = _Shape(1, len(responses), len(prompt), max(map(len, responses), default=0))
        key = shape.prompt.bit_length(), shape.response.bit_length()
        known, members = blocks.get(key, (None, []))
        blocks[key] = shape if known is None else known + shape, [*members, (prompt, responses)]
    found, start = list(blocks.values()), BLOCK_START.get(device.type, 1 << 20)
    while len(found) > 1:
        costs = {
            (one, other): (found[one][0] + found[other][0]).scores - found[one][0].scores - found[other][0].scores
            for other in range(len(found))
            for one in range(other)
        }
        one, other = min(costs, key=costs.__getitem__)
        if costs[one, other] > start:
            break
        (shape, members), (more, others) = found[one], found.pop(other)
        found[one] = shape + more, members + others
    return [members for _, members in found]


class Block:
    """Groups whose prompts are one padded block, and whose responses are another, [N, G, r]."""

    def __init__(self, parts: Sequence[Part], device: torch.device) -> None:
        self._device = device
        firsts = [prompt[0] for prompt, _ in parts]
        self.prompts = _Slots([prompt for prompt, _ in parts], firsts, device)
        self._members = max(len(responses) for _, responses in parts)
        self.responses: _Slots | None = None
        self.tokens = self.prompts.tokens
        """Row indices in the order of what `attend` gives."""
        if self._members:
            lists = [r for _, rs in parts for r in (*rs, *[[]] * (self._members - len(rs)))]
            fill = [one[0] if one else firsts[i // self._members] for i, one in enumerate(lists)]
            self.responses = _Slots(lists, fill, device)
            self.tokens = self.tokens + self.responses.tokens
        self._masks: dict[tuple[int | None, torch.dtype], tuple[torch.Tensor | None, ...]] = {}

    def prompt_cache(self, key_TKD: torch.Tensor, value_TKD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the prompts, [N, H_kv, P, D]."""
        key, value = (self.prompts.take(t).transpose(1, 2).contiguous() for t in (key_TKD, value_TKD))
        return key, value

    def attend(
        self,
        query_THD: torch.Tensor,
        key_TKD: torch.Tensor,
        value_TKD: torch.Tensor,
        prompt_cache: tuple[torch.Tensor, torch.Tensor],
        rule: ScoreRule,
    ) -> list[torch.Tensor]:
        """Attention output of this block's prompts, [tokens, H, D], and then of its responses."""
        prompt_key, prompt_value = prompt_cache
        if (asked := (rule.window, query_THD.dtype)) not in self._masks:
            self._masks[asked] = self._make_masks(*asked)
        causal, prompt_mask, own_mask = self._masks[asked]
        query = self.prompts.take(query_THD).transpose(1, 2)
        if rule.softcap is None:
            out = F.scaled_dot_product_attention(
                query, prompt_key, prompt_value, attn_mask=causal, is_causal=causal is None, scale=rule.scale,
                enable_gqa=query_THD.shape[1] != key_TKD.shape[1],
            )  # fmt: skip
        else:
            seen = _band(prompt_key.shape[2], None, self._device) if causal is None else causal
            out = _capped_attention(query * rule.scale, prompt_key, prompt_value, seen, rule.softcap)
        outputs = [self.prompts.real(out.transpose(1, 2))]
        if self.responses is not None:
            N, G, K = len(prompt_key), self._members, key_TKD.shape[1]
            query = self.responses.take(query_THD).unflatten(2, (K, -1)).unflatten(0, (N, G))
            key, value = (self.responses.take(t).unflatten(0, (N, G)).permute(0, 3, 1, 2, 4)
                          for t in (key_TKD, value_TKD))  # fmt: skip
            own: torch.Tensor = SharedPromptAttention.apply(
                query.permute(0, 3, 1, 2, 4, 5).contiguous(), prompt_key, prompt_value, key.contiguous(),
                value.contiguous(), prompt_mask, own_mask, rule.scale, rule.softcap,
            )  # fmt: skip
            own = own.permute(0, 2, 3, 1, 4, 5).reshape(*self.responses.shape, *query_THD.shape[1:])
            outputs.append(self.responses.real(own))
        return outputs

    def _make_masks(self, window: int | None, dtype: torch.dtype) -> tuple[torch.Tensor | None, ...]:
        """Within a prompt (bool, None: causal), from responses to their prompt (None: all of it), within a response.

        The last two are added to scores. Padding is on the right, so a causal mask hides it from every real query.
        """
        P, dtype = self.prompts.shape[1], torch.promote_types(dtype, torch.float32)
        causal = _band(P, window, self._device) if window is not None and window < P else None
        if self.responses is None:
            return causal, None, None
        r = self.responses.shape[1]
        own = torch.zeros(r, r, dtype=dtype, device=self._device)
        own.masked_fill_(~_band(r, window, self._device), -torch.inf)
        lengths_N = self.prompts.lengths[:, None, None]
        column = torch.arange(P, device=self._device)
        hidden = (column >= lengths_N).expand(-1, r, -1)
        if window is not None:
            hidden = hidden | (lengths_N + torch.arange(r, device=self._device)[:, None] - column >= window)
        # Told from lengths that the host knows, so that nobody waits for the device.
        if self.prompts.full and (window is None or P + r - 1 < window):
            return causal, None, own
        prompt = torch.zeros(hidden.shape, dtype=dtype, device=self._device).masked_fill_(hidden, -torch.inf)
        return causal, prompt.repeat(1, self._members, 1), own


def _capped_attention(
    query_NHPD: torch.Tensor, key_NKPD: torch.Tensor, value_NKPD: torch.Tensor, seen_PP: torch.Tensor, softcap: float
) -> torch.Tensor:
    """Attention [N, H, P, D] of scaled queries with capped scores, which torch's own function does not know."""
    per_kv = query_NHPD.shape[1] // key_NKPD.shape[1]
    key, value = (t.repeat_interleave(per_kv, 1) for t in (key_NKPD, value_NKPD))
    scores = softcap * torch.tanh(query_NHPD @ key.transpose(-1, -2) / softcap)
    scores = scores.masked_fill(~seen_PP, -torch.inf)
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype) @ value


def _band(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool [length, length]: j <= i, and j > i - window."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return seen if window is None else seen.triu(1 - window)
