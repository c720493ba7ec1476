"""Greedy generation for prompts that begin alike: the common beginning is computed once.

Few-shot prompts of one task differ in their last lines only. The tokens that all share are prefilled once; each batch
of rows then continues from that cache, which is allocated once, written in place and rewound for the next batch, so
that no step copies it. Rows of a batch are padded between the common beginning and their own tokens; with a sliding
window that a padded row would outgrow, only rows of equal length go together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache, DynamicCache, StaticLayer

Tokens = list[int]


@dataclass(frozen=True, kw_only=True)
class Stops:
    """When and how a generation goes on."""

    max_new_tokens: int
    """Longest generation, in tokens."""
    ends: frozenset[int] = frozenset()
    """Token ids that end a generation; the one that did is its last token."""
    ends_text: Callable[[Tokens], bool] = lambda tokens: False
    """Whether what has been generated ends it for another reason (a stop string)."""
    choices: tuple[tuple[int, ...], ...] = ()
    """Where not empty: the generation is one of these."""
    logprobs: int = 0
    """Likeliest tokens reported at each position, besides the chosen one."""


@dataclass(kw_only=True)
class Generated:
    """What came behind one prompt."""

    tokens: Tokens = field(default_factory=list)
    """Generated ids, the ending one included."""
    logprobs: list[dict[int, float]] = field(default_factory=list)
    """For each token the log-probabilities (nats, of the whole vocabulary) of the chosen token, which comes first, and
    of the likeliest ones; empty where none were asked for."""


def generate(
    model: Any,
    prompts: Sequence[Tokens],
    stops: Stops,
    *,
    batch: int,
    done: Callable[[list[int], list[Generated]], None] = lambda indices, generated: None,
) -> list[Generated]:
    """Greedy continuations of `prompts` (token ids, none empty), in their order.

    `model`: a Hugging Face causal language model in evaluation mode whose layers all are attention.
    `done` is called with the indices and the results of each finished batch.
    """
    if any(not prompt for prompt in prompts):
        raise ValueError("a prompt without a token cannot be continued")
    if any(kind not in ("full_attention", "sliding_attention", "chunked_attention") for kind in _layer_types(model)):
        raise ValueError(f"{type(model).__name__}: only models whose layers all are attention can be evaluated")
    found = [Generated() for _ in prompts]
    with torch.inference_mode():
        shared = common_prefix(prompts)
        rows = _Rows(model, prompts[0][:shared] if prompts else [], stops, max(map(len, prompts), default=0))
        for indices in _batches(prompts, batch, rows.needs_equal_lengths):
            results = rows.generate([prompts[index][shared:] for index in indices])
            for index, result in zip(indices, results, strict=True):
                found[index] = result
            done(indices, results)
    return found


def common_prefix(prompts: Sequence[Tokens]) -> int:
    """Tokens that all prompts begin with; at least one token of each is left over."""
    if not prompts:
        return 0
    first, last = min(prompts), max(prompts)  # in lexical order: what these two share, all share
    most = min(map(len, prompts)) - 1
    return next((i for i in range(most) if first[i] != last[i]), most)


def _batches(prompts: Sequence[Tokens], batch: int, equal: bool) -> Iterator[list[int]]:
    """Indices in order of length, at most `batch` at a time; `equal`: none with another length in it."""
    waiting: list[int] = []
    for index in sorted(range(len(prompts)), key=lambda index: len(prompts[index])):
        other = waiting and equal and len(prompts[index]) != len(prompts[waiting[0]])
        if len(waiting) == batch or other:
            yield waiting
            waiting = []
        waiting.append(index)
    if waiting:
        yield waiting


def _layer_types(model: Any) -> list[str]:
    config = model.config.get_text_config()
    return list(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)


class _Rows:
    """The common beginning, computed, and the cache in which rows continue from it."""

    def __init__(self, model: Any, prefix: Tokens, stops: Stops, longest: int) -> None:
        self.model, self.stops, self.prefix = model, stops, prefix
        self.room = longest + stops.max_new_tokens
        config = model.config.get_text_config()
        window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
        self.needs_equal_lengths = window is not None and self.room > window
        self.cache: Cache | None = None
        self.states: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Keys and values of the common beginning, [1, heads, tokens, head size] by layer."""
        if prefix:
            ids = torch.tensor([prefix], device=model.device)
            # Without a configuration: every layer keeps all tokens; the model's masks look after the windows.
            filled = DynamicCache()
            model(input_ids=ids, past_key_values=filled, use_cache=True, logits_to_keep=1)
            self.states = [(layer.keys, layer.values) for layer in filled.layers]

    def _rewound(self, rows: int) -> Cache:
        """A cache that holds the common beginning for `rows` rows and nothing else that is seen."""
        if self.cache is None or self.cache.layers[0].batch_size != rows:
            layers = [StaticLayer(max_cache_len=self.room) for _ in _layer_types(self.model)]
            for layer, (keys, values) in zip(layers, self.states, strict=bool(self.prefix)):
                layer.lazy_initialization(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1))
                layer.keys[:, :, : len(self.prefix)] = keys
                layer.values[:, :, : len(self.prefix)] = values
            self.cache = Cache(layers=layers)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(len(self.prefix))
        return self.cache

    def generate(self, suffixes: list[Tokens]) -> list[Generated]:
        """Continue the common beginning by each suffix, then greedily."""
        device, shared = self.model.device, len(self.prefix)
        longest = max(map(len, suffixes))
        ids = torch.zeros((len(suffixes), longest), dtype=torch.int64)
        mask = torch.ones((len(suffixes), self.room), dtype=torch.int64)
        for row, suffix in enumerate(suffixes):
            ids[row, longest - len(suffix) :] = torch.tensor(suffix)
            mask[row, shared : shared + longest - len(suffix)] = 0
        # A pad has the position before the row's first own token; it is masked, so any would do.
        lengths = torch.tensor([len(suffix) for suffix in suffixes])[:, None]
        positions = (shared + lengths - longest + torch.arange(longest)).clamp(min=0)
        ids, mask, positions = ids.to(device), mask.to(device), positions.to(device)

        cache, results = self._rewound(len(suffixes)), [Generated() for _ in suffixes]
        live = set(range(len(suffixes)))
        used = shared + longest
        while True:
            logits = self.model(
                input_ids=ids, attention_mask=mask[:, :used], position_ids=positions, past_key_values=cache,
                use_cache=True, logits_to_keep=1,
            ).logits[:, -1]  # fmt: skip
            ids = self._pick(logits, results, live)
            if not live:
                return results
            positions, used = positions[:, -1:] + 1, used + 1

    def _pick(self, logits: torch.Tensor, results: list[Generated], live: set[int]) -> torch.Tensor:
        """Append the likeliest allowed token to each live row and strike out the rows that end; [rows, 1]."""
        stops, scores = self.stops, logits
        if stops.choices:
            scores = torch.full_like(logits, float("-inf"))
            for row in live:
                allowed = _allowed(stops.choices, results[row].tokens)
                scores[row, allowed] = logits[row, allowed]
        picked = scores.argmax(-1)
        tokens = picked.tolist()
        if stops.logprobs:
            logprobs = torch.log_softmax(logits.float(), -1)
            best = logprobs.topk(min(stops.logprobs, logprobs.shape[-1]), -1)
            own = logprobs.gather(-1, picked[:, None])[:, 0].tolist()
            values, indices = best.values.tolist(), best.indices.tolist()
            for row in live:
                likeliest = dict(zip(indices[row], values[row], strict=True))
                results[row].logprobs.append({tokens[row]: own[row]} | likeliest)
        for row in list(live):
            generated = results[row].tokens
            generated.append(tokens[row])
            if (
                len(generated) >= stops.max_new_tokens
                or tokens[row] in stops.ends
                or (stops.choices and not _allowed(stops.choices, generated))
                or stops.ends_text(generated)
            ):
                live.discard(row)
        return picked[:, None]


def _allowed(choices: Sequence[tuple[int, ...]], generated: Tokens) -> Tokens:
    """What may come next on the way to one of the choices."""
    n = len(generated)
    return sorted({choice[n] for choice in choices if len(choice) > n and list(choice[:n]) == generated})
