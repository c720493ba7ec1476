"""How well a model predicts text, in bits a byte, so that different tokenizers can be compared.

    python eval/measure.py perplexity --model runs/NAME/export [TEACHER ...] --text fo=faroese.jsonl da=danish.txt

Several languages show drift: what the student gains in Faroese and loses elsewhere, beside the teacher.

The first word of each text is given, and everything behind it is predicted: the same bytes for every tokenizer, with
or without a start token. The end of a text is not scored, because not every tokenizer marks it. `perplexity` is
e to the mean nats of a *token*; it compares models of one tokenizer only. The bits of each text are kept in
perplexity.json, so that eval/compare.py can pair two models text by text.

Result: values TEXT/{bits_per_byte, perplexity}, data by TEXT, rows {text, id, bits, bytes, tokens} of each text with
more than one word.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.io.jsonl import read_texts
from configs.io.results import Result, Value, about_file, versions
from configs.prompts import Format
from configs.ranges import PositiveInt
from eval.measures.intervals import Examples, interval
from eval.measures.model import Model, context_length, not_numbers

LONGEST = 1024
"""Tokens of a window, at most."""
LOGITS = 1 << 29
"""Logits that a forward pass makes, at most: large vocabularies times long texts are more than memory holds."""
Part = tuple[int, list[int], int]
"""A window: place of its text, token ids, place of the first one scored."""


@dataclass(frozen=True, kw_only=True)
class PerplexitySettings:
    """Which texts, and how they are scored."""

    text: tuple[str, ...]
    """[NAME=]FILE: JSONL with `text`, or a text in each line."""
    batch: PositiveInt = 32
    """Windows in a forward pass, fewer where they are long."""


@dataclass(frozen=True)
class TextScore:
    """One text: what was scored of it, and what it cost."""

    nats: float
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Encoded:
    """A text as a model reads it; `ids[scored:]` is what lies behind its first word."""

    ids: list[int]
    scored: int
    bytes: int


def perplexity(model: Model, settings: PerplexitySettings) -> Result:
    """The model on each named text. Raises ValueError for a text in which there is nothing to predict."""
    files = named_texts(settings.text)
    texts = {name: read_texts(file) for name, file in files.items()}
    values: dict[str, Value] = {}
    data: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for name, found in texts.items():
        scores = score_texts(model.network, model.tokenizer, found, settings.batch)
        known = {str(place): one for place, one in enumerate(scores) if one is not None}
        if not known:
            raise ValueError(f"{files[name]}: no text has more than one word: there is nothing to predict")
        bits = {place: one.nats / math.log(2) for place, one in known.items()}
        columns = np.array([(bits[place], one.bytes) for place, one in known.items()], float)
        values[f"{name}/bits_per_byte"] = interval(Examples(ids=tuple(known), columns=columns))
        tokens = sum(one.tokens for one in known.values())
        values[f"{name}/perplexity"] = Value(math.exp(sum(one.nats for one in known.values()) / tokens))
        data[name] = about_file(files[name], len(known), len(found))
        rows += [
            {"text": name, "id": place, "bits": round(bits[place], 4), "bytes": one.bytes, "tokens": one.tokens}
            for place, one in known.items()
        ]
    return Result(
        measure="perplexity",
        model=model.path,
        data=data,
        settings={"dtype": model.dtype},
        versions=versions("torch", "transformers"),
        values=values,
        rows=rows,
    )


def named_texts(arguments: Sequence[str]) -> dict[str, Path]:
    """`NAME=FILE` or `FILE`, which is then named after the file. Raises ValueError for a name given twice."""
    found: dict[str, Path] = {}
    for argument in arguments:
        name, equals, file = argument.partition("=")
        if not equals:
            name, file = Path(argument).stem, argument
        if name in found:
            raise ValueError(
                f"--text {argument}: a second text called {name!r}; write another name in front: NAME=FILE"
            )
        found[name] = Path(file)
    return found


def encode(text: str, read: Format) -> Encoded | None:
    """The text with its first word marked off, as a model reads it; None where nothing lies behind that."""
    tokenizer = read.tokenizer
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__}: needs a tokenizer that says where its tokens lie (a fast one)")
    given = len(text.split(maxsplit=1)[0]) if text.split() else 0
    found = read.placed(text)
    ids = [token for token, _ in found]
    # A token that begins inside the first word is given, so that no tokenizer predicts a part of it.
    scored = next((index for index, (_, start) in enumerate(found) if start >= given), len(ids))
    if scored in (0, len(ids)):
        return None
    rest = text[given:]
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return Encoded(start + ids, len(start) + scored, len(rest.encode()))


def windows(encoded: Encoded, longest: int) -> list[tuple[list[int], int]]:
    """(token ids, place of the first one scored) of each forward pass: no more than `longest` tokens, each token
    behind the first window with at least half a window before it."""
    parts = []
    first = encoded.scored
    while first < len(encoded.ids):
        begin = 0 if len(encoded.ids) <= longest or first < longest // 2 else first - longest // 2
        end = min(begin + longest, len(encoded.ids))
        parts.append((encoded.ids[begin:end], first - begin))
        first = end
    return parts


def _passes(parts: Sequence[Part], batch: int, most: int) -> Iterator[Sequence[Part]]:
    """The windows, shortest first, `batch` at a time, and at most `most` tokens with their padding; one that has more
    is by itself."""
    begin = 0
    for end, (_, window, _) in enumerate(parts):
        if end > begin and (end - begin == batch or (end - begin + 1) * len(window) > most):
            yield parts[begin:end]
            begin = end
    if parts:
        yield parts[begin:]


def score_texts(
    network: Any, tokenizer: Any, texts: Sequence[str], batch: int = 32, longest: int = LONGEST
) -> list[TextScore | None]:
    """The model on each text; None for a text of a single word. `batch`: windows in a forward pass, at most. `longest`:
    tokens in one, where the model has room for them."""
    import torch

    longest = min(context_length(network) or longest, longest)
    read = Format(tokenizer)
    encoded = [encode(text, read) for text in texts]
    parts = [(place, *part) for place, one in enumerate(encoded) if one is not None for part in windows(one, longest)]
    parts.sort(key=lambda part: len(part[1]))
    nats, tokens = [0.0] * len(texts), [0] * len(texts)
    for chunk in _passes(parts, batch, LOGITS // network.config.get_text_config().vocab_size):
        ids = torch.zeros(len(chunk), len(chunk[-1][1]), dtype=torch.int64)
        counted = torch.zeros_like(ids, dtype=torch.bool)
        for row, (_, window, first) in enumerate(chunk):  # padded on the right: a causal model does not look ahead
            ids[row, : len(window)] = torch.tensor(window)
            counted[row, first : len(window)] = True
        mask = (torch.arange(ids.shape[1]) < torch.tensor([[len(window)] for _, window, _ in chunk])).long()
        ids, mask = ids.to(network.device), mask.to(network.device)
        with torch.inference_mode():
            logits = network(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            of_next = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].cpu().double()
        totals = of_next.masked_fill(~counted[:, 1:], 0.0).sum(1)
        if bool(totals.isnan().any()):
            raise not_numbers(network)
        for (place, _, _), total, count in zip(chunk, totals.tolist(), counted.sum(1).tolist(), strict=True):
            nats[place] -= total
            tokens[place] += count
    return [
        None if one is None else TextScore(nats[place], tokens[place], one.bytes) for place, one in enumerate(encoded)
    ]
