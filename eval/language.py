"""Does a model still write Faroese? The share of its continuations that are made of Faroese words.

A word list is the judge, not a language identifier: the texts are short, and what a small model writes when its
language decays is no other language but words put together wrongly (`drongrin`, `høvustað`). The list is every word of
the demo's questions, answers, contexts and raw text. The measure says nothing of grammar or sense, and a right word
that the list lacks counts against the model; `eval/ablation.py` puts what held-out Faroese text itself reaches, and
what the same text reaches with the letters of each word shuffled, beside the figures of the models.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from configs.jsonl import read_jsonl

WORD = re.compile(r"[^\W\d_]+")
KNOWN_SHARE = 0.9
"""Share of known words from which a continuation counts as Faroese."""


@dataclass(frozen=True)
class LanguageRate:
    """What a set of continuations is made of, in percent."""

    continuations: float
    """Continuations of which at least nine words in ten are known; one without any whole word does not count."""
    words: float
    """Known words among all whole words."""
    empty: float
    """Continuations without a whole word."""


@dataclass(frozen=True)
class Continuation:
    """`text` behind an `opening`; `ended`: by itself, so that its last word is whole."""

    opening: str
    text: str
    ended: bool

    def words(self) -> list[str]:
        """Whole words that end behind the opening: one begun in the opening and gone on with counts too."""
        whole = _folded(self.opening + self.text)
        border = len(_folded(self.opening))
        found = [match for match in WORD.finditer(whole) if match.end() > border]
        if found and not self.ended and found[-1].end() == len(whole):
            found.pop()  # cut off in the middle, perhaps
        return [match.group() for match in found]


def _folded(text: str) -> str:
    """Composed letters, lower case."""
    return unicodedata.normalize("NFC", text).lower()


def vocabulary(paths: Iterable[str | Path]) -> frozenset[str]:
    """Every word of the questions, contexts, answers and texts in JSONL files."""
    words: set[str] = set()
    for path in paths:
        for row in read_jsonl(path):
            texts = [row.get("question"), row.get("context"), row.get("text"), *(row.get("answers") or [])]
            for text in texts:
                words.update(WORD.findall(_folded(str(text or ""))))
    return frozenset(words)


def language_rate(continuations: Sequence[Continuation], known: frozenset[str]) -> LanguageRate:
    """How much of the continuations is made of known words."""
    faroese = right = total = empty = 0
    for continuation in continuations:
        words = continuation.words()
        hits = sum(word in known for word in words)
        right, total = right + hits, total + len(words)
        empty += not words
        faroese += bool(words) and hits >= KNOWN_SHARE * len(words)
    count = max(len(continuations), 1)
    return LanguageRate(100 * faroese / count, 100 * right / max(total, 1), 100 * empty / count)


def openings(texts: Sequence[str], count: int) -> list[tuple[str, str]]:
    """(first half of the words, the rest) of the first `count` texts that have at least three words."""
    found: list[tuple[str, str]] = []
    for text in texts:
        breaks = [match.start() for match in re.finditer(r" ", text)]
        if len(breaks) >= 2 and len(found) < count:
            cut = breaks[(len(breaks) - 1) // 2]
            found.append((text[:cut], text[cut:]))
    return found


def shuffled(text: str, rng: random.Random) -> str:
    """The same text with the letters of each word in another order."""
    return WORD.sub(lambda match: "".join(rng.sample(match.group(), len(match.group()))), text)


@torch.inference_mode()
def continue_texts(
    model: Any, tokenizer: Any, starts: Sequence[str], *, new_tokens: int = 24, seed: int = 0, batch: int = 64
) -> list[Continuation]:
    """One sample at temperature 1 behind each opening, at most `new_tokens` tokens, the same for the same seed."""
    torch.manual_seed(seed)
    end = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
    generation = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new_tokens, eos_token_id=end,
        pad_token_id=pad,
    )  # fmt: skip
    made: list[Continuation] = []
    for begin in range(0, len(starts), batch):
        part = list(starts[begin : begin + batch])
        prompts = [tokenizer(text, add_special_tokens=True)["input_ids"] for text in part]
        longest = max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        output = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=generation
        )
        for prompt, row in zip(prompts, output[:, longest:].tolist(), strict=True):
            ended = end in row
            new = row[: row.index(end)] if ended else row
            before = tokenizer.decode(prompt, skip_special_tokens=True)
            whole = tokenizer.decode(prompt + new, skip_special_tokens=True)
            made.append(Continuation(before, whole[len(before) :], ended))
    return made
