"""Does a model still write Faroese? The share of its continuations that are made of Faroese words.

    python eval/measure.py language --model DIR [DIR2 ...] --text heldout.jsonl --words questions.jsonl text.jsonl

A word list decides, not a language identifier: the texts are short, and a small model whose language decays does not
write another language but malformed words (`drongrin`, `høvustað`). The list is every word of the questions, answers,
contexts and texts in --words. Grammar and meaning do not count, and a correct word that the list lacks counts against
the model. On the demo, held-out Faroese text itself reaches over 90 %, and the same text with the letters of each word
shuffled stays below 10 % (tests/eval/measures/test_language.py).

Result: values language_rate, known_words and empty, in percent; rows {id, opening, text, ended}.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from configs.io.jsonl import read_jsonl, read_texts
from configs.io.questions import as_question
from configs.io.results import Result, Value, about_file, versions
from configs.prompts import Format
from configs.ranges import PositiveInt
from eval.measures.intervals import interval, means
from eval.measures.model import Model, context_length, end_tokens

WORD = re.compile(r"[^\W\d_]+")
KNOWN_SHARE = 0.9
"""Share of known words from which a continuation counts as Faroese."""


@dataclass(frozen=True, kw_only=True)
class LanguageSettings:
    """What is gone on with, and which words are known."""

    text: Path
    """Faroese texts, whose first halves a model gets: JSONL with `text`, or one in each line."""
    words: tuple[str, ...]
    """Files of known words: every word of questions, contexts, answers and texts, in any layout of docs/data.md."""
    continuations: PositiveInt = 256
    """Number of texts that are continued, at most."""
    new_tokens: PositiveInt = 24
    """Longest continuation."""
    seed: int = 0
    """Seed of the samples."""


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


def language(model: Model, settings: LanguageSettings) -> Result:
    """How much of what the model goes on with is Faroese."""
    texts, known = read_texts(settings.text), vocabulary(settings.words)
    starts = [opening for opening, _ in openings(texts, settings.continuations)]
    if not starts:
        raise ValueError(f"{settings.text}: no text has three words, of which a model could get the first half")
    made = continue_texts(model.network, model.tokenizer, starts, new_tokens=settings.new_tokens, seed=settings.seed)
    rate = language_rate(made, known)
    faroese = [language_rate([one], known)["language_rate"] for one in made]
    return Result(
        measure="language",
        model=model.path,
        data={**about_file(settings.text, len(starts), len(texts)), "words": list(settings.words), "known": len(known)},
        settings={"dtype": model.dtype, "new_tokens": settings.new_tokens, "seed": settings.seed},
        versions=versions("torch", "transformers"),
        values={
            **{name: Value(share) for name, share in rate.items()},
            "language_rate": interval(means([str(place) for place in range(len(made))], faroese)),
        },
        rows=[{"id": str(place), **asdict(one)} for place, one in enumerate(made)],
    )


def _folded(text: str) -> str:
    """Composed letters, lower case."""
    return unicodedata.normalize("NFC", text).lower()


def vocabulary(paths: Iterable[str | Path]) -> frozenset[str]:
    """Every word of the questions, contexts, answers and texts in files of rows, in any layout of docs/data.md."""
    words: set[str] = set()
    for path in paths:
        for row in read_jsonl(path, convert=partial(as_question, answers=False)):
            texts = [row.get("question"), row.get("context"), row.get("text"), *(row.get("answers") or [])]
            for text in texts:
                words.update(WORD.findall(_folded(str(text or ""))))
    return frozenset(words)


def language_rate(continuations: Sequence[Continuation], known: frozenset[str]) -> dict[str, float]:
    """In percent: continuations of which at least nine words in ten are known (`language_rate`; one without any whole
    word does not count), known words among all whole words, continuations without a whole word."""
    faroese = right = total = empty = 0
    for continuation in continuations:
        words = continuation.words()
        hits = sum(word in known for word in words)
        right, total = right + hits, total + len(words)
        empty += not words
        faroese += bool(words) and hits >= KNOWN_SHARE * len(words)
    count = max(len(continuations), 1)
    shares = {"language_rate": faroese / count, "known_words": right / max(total, 1), "empty": empty / count}
    return {name: 100 * share for name, share in shares.items()}


def openings(texts: Sequence[str], count: int) -> list[tuple[str, str]]:
    """(first half of the words, the rest) of the first `count` texts that have at least three words."""
    found: list[tuple[str, str]] = []
    for text in texts:
        breaks = [match.start() for match in re.finditer(r" ", text)]
        if len(breaks) >= 2 and len(found) < count:
            cut = breaks[(len(breaks) - 1) // 2]
            found.append((text[:cut], text[cut:]))
    return found


def continue_texts(
    network: Any, tokenizer: Any, starts: Sequence[str], *, new_tokens: int = 24, seed: int = 0
) -> list[Continuation]:
    """One sample at temperature 1 behind each opening, at most `new_tokens` tokens, the same for the same seed. Raises
    ValueError where the model has no room for that."""
    import torch

    from eval.measures.generation import Decoding, generate

    torch.manual_seed(seed)
    ends = end_tokens(network, tokenizer)
    plain = Format(tokenizer)
    prompts = [list(plain.prompt(text)) for text in starts]
    longest, room = max(map(len, prompts)) + new_tokens, context_length(network)
    if room is not None and longest > room:
        raise ValueError(
            f"--text: half a text with its continuation takes up to {longest} tokens, the model has room for {room}; "
            "give shorter texts"
        )
    decoding = Decoding(max_new_tokens=new_tokens, batch=64, ends=ends, sampled=True)
    made = []
    for prompt, found in zip(prompts, generate(network, prompts, decoding), strict=True):
        ended = found.tokens[-1] in ends
        before = tokenizer.decode(prompt, skip_special_tokens=True)
        whole = tokenizer.decode(prompt + found.tokens[: -1 if ended else None], skip_special_tokens=True)
        made.append(Continuation(before, whole[len(before) :], ended))
    return made
