"""Generation for every measure: greedy or sampled, and the beginning that all prompts share is computed once.

Few-shot prompts of one task differ in their last lines only. The tokens that all share are prefilled once; each batch
of rows then continues from that cache, which is allocated once, written in place and rewound for the next batch, so
that no step copies it. Rows of a batch are padded between the common beginning and their own tokens; with a sliding
window that a padded row would outgrow, only rows of equal length go together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Cache, DynamicCache, StaticLayer

from configs.io.lines import LineFile, whole_rows
from eval.measures.model import not_numbers

Tokens = list[int]


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How a generation goes on, and when it ends."""

    max_new_tokens: int
    """Longest generation, in tokens."""
    batch: int
    """Prompts at a time."""
    ends: frozenset[int] = frozenset()
    """Token ids that end a generation; the one that did is its last token."""
    stops: tuple[str, ...] = ()
    """Strings that end a generation whose last tokens hold one."""
    decode: Callable[[Tokens], str] = lambda tokens: ""
    """Text of tokens, for `stops`."""
    choices: tuple[tuple[int, ...], ...] = ()
    """Where not empty: the generation is one of these."""
    logprobs: int = 0
    """Likeliest tokens reported at each position, besides the chosen one."""
    sampled: bool = False
    """One sample at temperature 1, from torch's generator; else the likeliest token each time."""


@dataclass(kw_only=True)
class Generated:
    """What came behind one prompt."""

    tokens: Tokens = field(default_factory=list)
    """Generated ids, the ending one included."""
    logprobs: list[dict[int, float]] = field(default_factory=list)
    """For each token the log-probabilities (nats, of the whole vocabulary) of the chosen token, which comes first, and
    of the likeliest ones; empty where none were asked for."""


class Journal:
    """What has been generated greedily, in a JSONL file, so that a killed evaluation goes on behind its last batch."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, Generated] = {}
        for row in whole_rows(path):
            logprobs = [{int(token): value for token, value in place} for place in row["logprobs"]]
            self.known[row["key"]] = Generated(tokens=row["tokens"], logprobs=logprobs)

    def key(self, prompt: Tokens, decoding: Decoding) -> str:
        """Of a prompt and all that its continuation depends on."""
        rules = (decoding.max_new_tokens, sorted(decoding.ends), decoding.stops, decoding.choices, decoding.logprobs)
        return hashlib.sha256(f"{prompt} {rules}".encode()).hexdigest()

    def add(self, found: Mapping[str, Generated]) -> None:
        """Write down what has been generated, by key."""
        self.known |= found
        file = LineFile(self.path)
        for key, one in found.items():
            row = {"key": key, "tokens": one.tokens, "logprobs": [list(place.items()) for place in one.logprobs]}
            file.append(json.dumps(row))


def generate(
    network: Any,
    prompts: Sequence[Tokens],
    decoding: Decoding,
    journal: Journal | None = None,
    progress: Callable[[int], object] = lambda rows: None,
) -> list[Generated]:
    """Continuations of `prompts` (token ids, none empty), in their order.

    `network`: a Hugging Face causal language model in evaluation mode whose layers all are attention. What `journal`
    knows is not generated again, and equal prompts once. `progress` is told how many more prompts are answered.
    """
    if journal is None:
        found = [Generated() for _ in prompts]
        for indices, results in _generate(network, prompts, decoding):
            for index, result in zip(indices, results, strict=True):
                found[index] = result
            progress(len(indices))
        return found
    keys = [journal.key(prompt, decoding) for prompt in prompts]
    missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in journal.known}
    progress(len(prompts) - len(missing))
    names = list(missing)
    for indices, results in _generate(network, list(missing.values()), decoding):
        journal.add({names[index]: result for index, result in zip(indices, results, strict=True)})
        progress(len(indices))
    return [journal.known[key] for key in keys]


def _generate(
    network: Any, prompts: Sequence[Tokens], decoding: Decoding
) -> Iterator[tuple[list[int], list[Generated]]]:
    """(indices, continuations) of each batch."""
    if any(not prompt for prompt in prompts):
        raise ValueError("a prompt without a token cannot be continued")
    if any(kind not in ("full_attention", "sliding_attention", "chunked_attention") for kind in _layer_types(network)):
        raise ValueError(f"{type(network).__name__}: only models whose layers all are attention can be evaluated")
    if not prompts:
        return
    with torch.inference_mode():
        shared = common_prefix(prompts)
        rows = _Rows(network, prompts[0][:shared], decoding, max(map(len, prompts)))
    for indices in _batches(prompts, decoding, rows.needs_equal_lengths):
        with torch.inference_mode():
            results = rows.generate([prompts[index][shared:] for index in indices])
        yield indices, results


def common_prefix(prompts: Sequence[Tokens]) -> int:
    """Tokens that all prompts begin with; at least one token of each is left over."""
    if not prompts:
        return 0
    first, last = min(prompts), max(prompts)  # in lexical order: what these two share, all share
    most = min(map(len, prompts)) - 1
    return next((i for i in range(most) if first[i] != last[i]), most)


def _batches(prompts: Sequence[Tokens], decoding: Decoding, equal: bool) -> Iterator[list[int]]:
    """Indices in order of length (samples: as given, so that a seed says the same), at most a batch at a time;
    `equal`: none with another length in it."""
    waiting: list[int] = []
    order = range(len(prompts))
    for index in order if decoding.sampled else sorted(order, key=lambda index: len(prompts[index])):
        other = waiting and equal and len(prompts[index]) != len(prompts[waiting[0]])
        if len(waiting) == decoding.batch or other:
            yield waiting
            waiting = []
        waiting.append(index)
    if waiting:
        yield waiting


def _layer_types(network: Any) -> list[str]:
    config = network.config.get_text_config()
    return list(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)


class _Rows:
    """The common beginning, computed, and the cache in which rows continue from it."""

    def __init__(self, network: Any, prefix: Tokens, decoding: Decoding, longest: int) -> None:
        self.network, self.decoding, self.prefix = network, decoding, prefix
        self.room = longest + decoding.max_new_tokens
        config = network.config.get_text_config()
        window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
        self.needs_equal_lengths = window is not None and self.room > window
        self.cache: Cache | None = None
        self.states: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Keys and values of the common beginning, [1, heads, tokens, head size] by layer."""
        if prefix:
            ids = torch.tensor([prefix], device=network.device)
            # Without a configuration: every layer keeps all tokens; the model's masks look after the windows.
            filled = DynamicCache()
            network(input_ids=ids, past_key_values=filled, use_cache=True, logits_to_keep=1)
            self.states = [(layer.keys, layer.values) for layer in filled.layers]

    def _rewound(self, rows: int) -> Cache:
        """A cache that holds the common beginning for `rows` rows and nothing else that is seen."""
        if self.cache is None or self.cache.layers[0].batch_size != rows:
            layers = [StaticLayer(max_cache_len=self.room) for _ in _layer_types(self.network)]
            for layer, (keys, values) in zip(layers, self.states, strict=bool(self.prefix)):
                layer.lazy_initialization(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1))
                layer.keys[:, :, : len(self.prefix)] = keys
                layer.values[:, :, : len(self.prefix)] = values
            self.cache = Cache(layers=layers)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(len(self.prefix))
        return self.cache

    def generate(self, suffixes: list[Tokens]) -> list[Generated]:
        """Continue the common beginning by each suffix, then as `decoding` says."""
        device, shared = self.network.device, len(self.prefix)
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
            logits = self.network(
                input_ids=ids,
                attention_mask=mask[:, :used],
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            ids = self._pick(logits, results, live)
            if not live:
                return results
            positions, used = positions[:, -1:] + 1, used + 1

    def _pick(self, logits: torch.Tensor, results: list[Generated], live: set[int]) -> torch.Tensor:
        """Append the next token to each live row and strike out the rows that end; [rows, 1]."""
        if bool(logits.isnan().any()):
            raise not_numbers(self.network)
        decoding, scores = self.decoding, logits
        if decoding.choices:
            scores = torch.full_like(logits, float("-inf"))
            for row in live:
                allowed = _allowed(decoding.choices, results[row].tokens)
                scores[row, allowed] = logits[row, allowed]
        picked = scores.argmax(-1)
        if decoding.sampled:
            picked = torch.multinomial(scores.float().softmax(-1), 1)[:, 0]
        tokens = picked.tolist()
        if decoding.logprobs:
            logprobs = torch.log_softmax(logits.float(), -1)
            best = logprobs.topk(min(decoding.logprobs, logprobs.shape[-1]), -1)
            own = logprobs.gather(-1, picked[:, None])[:, 0].tolist()
            values, indices = best.values.tolist(), best.indices.tolist()
            for row in live:
                likeliest = dict(zip(indices[row], values[row], strict=True))
                results[row].logprobs.append({tokens[row]: own[row]} | likeliest)
        for row in list(live):
            generated = results[row].tokens
            generated.append(tokens[row])
            if (
                len(generated) >= decoding.max_new_tokens
                or tokens[row] in decoding.ends
                or (decoding.choices and not _allowed(decoding.choices, generated))
                or self._stopped(generated)
            ):
                live.discard(row)
        return picked[:, None]

    def _stopped(self, generated: Tokens) -> bool:
        if not self.decoding.stops:
            return False
        tail = self.decoding.decode(generated[-16:])
        return any(text in tail for text in self.decoding.stops)


def _allowed(choices: Sequence[tuple[int, ...]], generated: Tokens) -> Tokens:
    """What may come next on the way to one of the choices."""
    n = len(generated)
    return sorted({choice[n] for choice in choices if len(choice) > n and list(choice[:n]) == generated})
