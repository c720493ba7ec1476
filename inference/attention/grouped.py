"""Grouped attention: one function for the student, the reference, the critic, the teacher and the sampler.

A plan knows which token may see which. `PackedPlan` serves a packed row (inference/attention/packing.py),
`PrefillPlan` is a packed row of prompts that keeps keys and values, and `DecodePlan` lets one query of each response
see the one shared cache of its prompt and its own suffix. Models call `plan.attend` in place of their own attention.
Shapes: T tokens in the row, H query heads, H_kv key-value heads (H_kv divides H), D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from inference.attention.packing import PackedRow
from inference.attention.prompt_cache import SharedPromptAttention
from inference.attention.varlen import VarlenLayout, flash_attention

NAME = "grpo_kd_grouped"
"""Name of this attention in transformers' registry."""


UNKNOWN = ("s_aux", "sinks", "position_bias", "indices", "block_indices")
"""What a model may hand to its attention besides what a plan takes: sinks (gpt-oss), biases, sparsity."""


class NotGrouped(ValueError):
    """A model whose attention a plan cannot say."""


@dataclass(frozen=True)
class ScoreRule:
    """How a layer scores keys."""

    scale: float
    """Times query . key."""
    window: int | None = None
    """A token sees itself and the `window` - 1 before it. None: all."""
    softcap: float | None = None
    """Scores are softcap * tanh(score / softcap) (Gemma 2, arXiv 2408.00118, section 2)."""


class AttentionPlan(Protocol):
    """What a model needs: attention over a row whose structure the plan knows."""

    def attend(
        self, layer: int, query_THD: torch.Tensor, key_TKD: torch.Tensor, value_TKD: torch.Tensor, rule: ScoreRule
    ) -> torch.Tensor:
        """Attention output [T, H, D]."""
        ...


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


def _parts(row: PackedRow) -> list[Part]:
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


def _alike(parts: list[Part], device: torch.device) -> list[list[Part]]:
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


class _Block:
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


class PackedPlan:
    """Attention within each group of a packed row: the prompt is causal, a response sees the prompt and itself.

    Prompts are one padded block. Responses are another, whose queries see the one copy of their prompt's keys and their
    own (inference/attention/prompt_cache.py): no work is done between responses, and no prompt is copied. Only
    attention is padded, nothing else, and groups of very different lengths are not padded to each other. On CUDA a
    half-precision row goes through flash-attn's or torch's variable-length kernel where there is one
    (inference/attention/varlen.py).
    """

    def __init__(self, row: PackedRow) -> None:
        parts, device = _parts(row), row.tokens_T.device
        self._blocks = [_Block(one, device) for one in self._together(parts, device)]
        tokens = [i for block in self._blocks for i in block.tokens]
        self._place_T = None
        if tokens != list(range(len(tokens))):
            self._place_T = torch.argsort(torch.tensor(tokens, dtype=torch.int64, device=device))
        self._varlen = VarlenLayout(parts, device) if flash_attention(device) is not None else None

    def _together(self, parts: list[Part], device: torch.device) -> list[list[Part]]:
        """The groups of each block."""
        return _alike(parts, device)

    def attend(
        self, layer: int, query_THD: torch.Tensor, key_TKD: torch.Tensor, value_TKD: torch.Tensor, rule: ScoreRule
    ) -> torch.Tensor:
        """See `AttentionPlan.attend`."""
        kernel = flash_attention(query_THD.device)
        half = query_THD.dtype in (torch.bfloat16, torch.float16)
        if kernel is not None and self._varlen is not None and half and rule.softcap is None:
            if isinstance(self, PrefillPlan):  # nobody else wants them as a block
                self._keep(layer, self._blocks[0], key_TKD, value_TKD)
            return self._varlen.attend(kernel, query_THD, key_TKD, value_TKD, scale=rule.scale, window=rule.window)
        outputs: list[torch.Tensor] = []
        for block in self._blocks:
            prompt_cache = self._keep(layer, block, key_TKD, value_TKD)
            outputs += block.attend(query_THD, key_TKD, value_TKD, prompt_cache, rule)
        whole = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return whole if self._place_T is None else whole.index_select(0, self._place_T)

    def _keep(
        self, layer: int, block: _Block, key_TKD: torch.Tensor, value_TKD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a block's prompts; `PrefillPlan` keeps them."""
        return block.prompt_cache(key_TKD, value_TKD)


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


@dataclass(frozen=True)
class PromptCache:
    """Keys and values of N prompts, computed once, shared by the responses of each."""

    lengths: tuple[int, ...]
    """Prompt tokens of each of the N prompts, as the host knows them."""
    lengths_N: torch.Tensor
    """int64 [N] the same on the device."""
    keys: dict[int, torch.Tensor]
    """layer -> [N, H_kv, P, D], right-padded."""
    values: dict[int, torch.Tensor]
    """layer -> [N, H_kv, P, D], right-padded."""

    @property
    def longest(self) -> int:
        """P."""
        return next(iter(self.keys.values())).shape[2]


class PrefillPlan(PackedPlan):
    """A packed row of prompts that keeps the keys and values of every layer."""

    def __init__(self, row: PackedRow) -> None:
        super().__init__(row)
        lengths_N = torch.tensor(row.group_lengths, device=row.tokens_T.device)
        self.cache = PromptCache(row.group_lengths, lengths_N, keys={}, values={})

    def _together(self, parts: list[Part], device: torch.device) -> list[list[Part]]:
        return [parts]

    def _keep(
        self, layer: int, block: _Block, key_TKD: torch.Tensor, value_TKD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.cache.keys[layer], self.cache.values[layer] = kept = super()._keep(layer, block, key_TKD, value_TKD)
        return kept


class DecodePlan:
    """One query of each active response against its prompt's cache and its own preallocated suffix.

    The prompt's cache is never expanded. All responses of a batch are at the same step t; finished ones leave the row
    (`rows_A`), so only attention, and no matrix product of the model, still sees their slots. Where half of the groups
    have finished, attention leaves them too.
    """

    def __init__(self, prompts: PromptCache, group_size: int, max_new_tokens: int) -> None:
        self._prompts = prompts
        self._group = group_size
        self._held_N = torch.arange(len(prompts.lengths), device="cpu")
        """Numbers of the groups whose caches are here, on the host."""
        self.max_new_tokens = max_new_tokens
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}
        self._rows_A = torch.empty(0, dtype=torch.int64)
        self._everybody = False
        self._hidden: dict[int | None, tuple[torch.Tensor | None, torch.Tensor | None]] = {}
        self._step = -1
        self._read = 0
        """Own slots that a query reads."""

    def advance(self, rows_A: torch.Tensor) -> torch.Tensor:
        """Start the next step with the active responses `rows_A` (int64 [A] on the host, ascending, indices in
        [0, N*G), each of which was active before).

        Returns their positions, int64 [A], where the cache is.
        """
        self._step += 1
        if self._step >= self.max_new_tokens:
            raise ValueError(f"step {self._step} is past the {self.max_new_tokens} preallocated slots")
        self._read = self._step + 1
        # What the full view hides (padding) does not change from step to step; a window moves.
        self._hidden = {w: hidden for w, hidden in self._hidden.items() if w is None}
        active = torch.unique(rows_A // self._group)
        if 2 * len(active) <= len(self._held_N):
            self._keep_only(active)
        place_A = torch.searchsorted(self._held_N, rows_A // self._group)
        self._rows_A = (place_A * self._group + rows_A % self._group).to(self._prompts.lengths_N.device)
        self._everybody = len(rows_A) == len(self._held_N) * self._group
        return self._prompts.lengths_N[self._rows_A // self._group] + self._step

    def _keep_only(self, groups_N: torch.Tensor) -> None:
        """Let go of the caches of all other groups, and of the padding that only their prompts needed."""
        places = torch.searchsorted(self._held_N, groups_N)
        self._held_N, self._hidden = groups_N, {}
        lengths = tuple(self._prompts.lengths[place] for place in places.tolist())
        places = places.to(self._prompts.lengths_N.device)
        held = self._prompts
        for caches in (held.keys, held.values, self._keys, self._values):
            for layer, cache in caches.items():  # one at a time, so that never two whole caches are alive
                caches[layer] = cache.index_select(0, places)
        keys, values = ({n: c[:, :, : max(lengths)] for n, c in caches.items()} for caches in (held.keys, held.values))
        self._prompts = PromptCache(lengths, held.lengths_N[places], keys=keys, values=values)

    def attend(
        self, layer: int, query_THD: torch.Tensor, key_TKD: torch.Tensor, value_TKD: torch.Tensor, rule: ScoreRule
    ) -> torch.Tensor:
        """See `AttentionPlan.attend`; T = A active responses, one query each."""
        prompt_key, prompt_value = self._prompts.keys[layer], self._prompts.values[layer]
        N, K, P, D = prompt_key.shape
        G, per_kv = self._group, query_THD.shape[1] // K
        if layer not in self._keys:
            self._keys[layer] = prompt_key.new_zeros(N, K, G, self.max_new_tokens, D)
            self._values[layer] = prompt_key.new_zeros(N, K, G, self.max_new_tokens, D)
        keys, values = self._keys[layer], self._values[layer]
        # [A, ...] in the order of the batch; slots of finished responses hold zeros that nobody reads.
        query_BHD, key_BKD, value_BKD = (self._all_slots(t) for t in (query_THD, key_TKD, value_TKD))
        self._write(keys, key_BKD.view(N, G, K, D).transpose(1, 2))
        self._write(values, value_BKD.view(N, G, K, D).transpose(1, 2))

        query = query_BHD.mul(rule.scale).view(N, G, K, per_kv, D).transpose(1, 2).contiguous()
        scores = torch.cat(
            [
                (query.view(N * K, G * per_kv, D) @ prompt_key.flatten(0, 1).transpose(1, 2)).view(-1, per_kv, P),
                query.view(-1, per_kv, D) @ keys.view(-1, self.max_new_tokens, D)[:, : self._read].transpose(1, 2),
            ],
            -1,
        )
        if rule.softcap is not None:
            scores.div_(rule.softcap).tanh_().mul_(rule.softcap)
        if rule.window not in self._hidden:
            self._hidden[rule.window] = self._blocked(rule.window)
        of_prompt, own = self._hidden[rule.window]
        if of_prompt is not None:
            scores.view(N, K * G * per_kv, -1)[..., :P].masked_fill_(of_prompt[:, None], -torch.inf)
        if own is not None:
            scores[..., P:].masked_fill_(own, -torch.inf)
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
        from_prompt = weights.view(N * K, G * per_kv, -1)[..., :P] @ prompt_value.flatten(0, 1)
        suffix_value = values.view(-1, self.max_new_tokens, D)[:, : self._read]
        out = torch.baddbmm(from_prompt.view(-1, per_kv, D), weights[..., P:], suffix_value)
        out_BHD = out.view(N, K, G, per_kv, D).transpose(1, 2).reshape(N * G, K * per_kv, D)
        return out_BHD if self._everybody else out_BHD[self._rows_A]

    def _all_slots(self, active: torch.Tensor) -> torch.Tensor:
        """[A, ...] of the active responses as [B, ...]."""
        if self._everybody:
            return active
        slots = active.new_zeros(len(self._prompts.lengths_N) * self._group, *active.shape[1:])
        slots[self._rows_A] = active
        return slots

    def _write(self, cache_NKGRD: torch.Tensor, new_NKGD: torch.Tensor) -> None:
        """Put this step's keys or values into their slots."""
        cache_NKGRD[:, :, :, self._step] = new_NKGD

    def _blocked(self, window: int | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """bool [N, P], true where a prompt slot is padding or has left the window; bool [slots read], the same of
        their own. None: nowhere. Once a step."""
        longest, own = max(self._prompts.lengths), None
        if window is not None and self._step >= window:
            own = torch.arange(self._read, device=self._prompts.lengths_N.device) <= self._step - window
        padded = min(self._prompts.lengths) < longest
        if not padded and (window is None or longest + self._step < window):
            return None, own
        return self._hidden_prompt(window, self._step), own

    def _hidden_prompt(self, window: int | None, step: int | torch.Tensor) -> torch.Tensor:
        lengths = self._prompts.lengths_N[:, None]
        column = torch.arange(self._prompts.longest, device=lengths.device)[None]
        blocked = column >= lengths
        return blocked if window is None else blocked | (lengths + step - column >= window)


def _transformers_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    plan: AttentionPlan | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [1, H, T, D] in, output [1, T, H, D] out.

    Raises NotGrouped for attention that a plan does not say: whoever called the model then leaves packed rows.
    """
    if plan is None:
        raise NotGrouped(f"attention '{NAME}' needs a plan: call the model with plan=PackedPlan(row)")
    unknown = [name for name in UNKNOWN if kwargs.get(name) is not None]
    if unknown or _hidden_window(module, sliding_window):
        raise NotGrouped(f"grouped attention does not know {', '.join(unknown) or 'a window that only a mask says'}")
    rule = ScoreRule(scaling if scaling is not None else query.shape[-1] ** -0.5, sliding_window, softcap)
    layer: int = module.layer_idx  # type: ignore[assignment]
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return plan.attend(layer, query, key, value, rule)[None], None


def _hidden_window(module: torch.nn.Module, window: int | None) -> bool:
    """Whether the layer does not see everything before it, and only transformers' mask, which is not made, says so."""
    types, layer = getattr(module.config, "layer_types", None), module.layer_idx
    if not types:  # PhiMoE
        return window is None and getattr(module.config, "sliding_window", None) is not None
    kind = types[layer] if isinstance(layer, int) and layer < len(types) else "full_attention"
    return kind == "chunked_attention" or (kind == "sliding_attention" and window is None)


def register_with_transformers() -> str:
    """Add grouped attention to transformers' registry; returns its name for `attn_implementation`.

    No mask function is registered under that name, so transformers builds none: the plan is the mask.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _transformers_attention)
    return NAME
