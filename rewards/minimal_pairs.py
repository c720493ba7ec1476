"""Pairs of a right sentence and one with a single mistake in it: does a model know which is which?

After ScaLA (arXiv 2304.00906): two neighbouring words change places, or a word is left out. And two that need the
language's forms: an ending is exchanged for another of the same paradigm (ENDINGS), or a verb or pronoun is put into
another person or case (FORMS). A mistake made by rule is now and then right as well (a word that may be left out, a
neuter that may be either case); the share of such pairs caps what a perfect judge reaches.

The first word is never touched: it is given, and the log-probability is that of all behind it, so that every tokenizer
and every model, with or without a start symbol, is asked the same.

Pure: text in, text out. The scoring is in eval/measures/minimal_pairs.py and training/teacher/check.py.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rewards.answers import composed

ENDINGS: tuple[tuple[str, ...], ...] = (
    # The noun with its article: masculine, feminine and neuter, singular and plural, by case.
    ("urin", "in", "num", "arnir", "inum", "sins", "anna", "unum"),
    ("an", "ina", "ini", "irnar", "urnar", "arnar"),
    ("ið", "inum", "ini", "anna"),
    # Weak and strong adjectives.
    ("ur", "an", "um", "ir", "ar", "a", "i"),
    # Verbs: person and number, present and past.
    ("aði", "aðu", "ar", "a", "að"),
    ("di", "du", "ir", "a"),
)
"""Endings of one paradigm each; one may stand for another behind the same stem. Longer endings are tried first."""
FORMS: tuple[tuple[str, ...], ...] = (
    ("er", "eru", "eri", "ert"),
    ("var", "vóru", "vart"),
    ("hevur", "hava", "havi", "hevði", "høvdu"),
    ("verður", "verða", "verði", "varð", "vórðu"),
    ("kann", "kunna", "kundi", "kundu"),
    ("skal", "skulu", "skuldi", "skuldu"),
    ("vil", "vilja", "vildi", "vildu"),
    ("eg", "meg", "mær", "mín"),
    ("tú", "teg", "tær", "tín"),
    ("hann", "honum", "hansara"),
    ("hon", "hana", "henni", "hennara"),
    ("vit", "okkum", "okkara"),
    ("teir", "teimum", "teirra"),
    ("hesin", "henda", "hesum", "hetta", "hesa", "hesi"),
    ("ein", "eina", "eini", "einum", "eitt"),
)
"""Whole words; one form stands for another."""
KINDS = ("swap", "deletion", "ending", "form")
LONGEST_STEM, SHORTEST_STEM = 30, 3


@dataclass(frozen=True)
class Pair:
    """One sentence, right and wrong."""

    right: str
    wrong: str
    kind: str
    """Which mistake: one of KINDS."""


def make_pairs(sentences: Sequence[str], count: int, seed: int = 0) -> list[Pair]:
    """Up to `count` pairs, the kinds in turn, each sentence used once; the same for the same seed.

    A sentence to which the kind whose turn it is does not apply gets the next kind that does. Sentences of fewer than
    4 or more than 40 words are left out, and so are repeated ones.
    """
    clean = dict.fromkeys(" ".join(composed(s).split()) for s in sentences)  # ENDINGS and FORMS are composed too
    chosen = [s for s in clean if 4 <= len(s.split()) <= 40]
    rng = random.Random(seed)
    rng.shuffle(chosen)
    pairs: list[Pair] = []
    for sentence in chosen:
        if len(pairs) >= count:
            break
        for turn in range(len(KINDS)):
            kind = KINDS[(len(pairs) + turn) % len(KINDS)]
            wrong = corrupt(sentence, kind, rng)
            if wrong is not None:
                pairs.append(Pair(sentence, wrong, kind))
                break
    return pairs


def corrupt(sentence: str, kind: str, rng: random.Random) -> str | None:
    """The sentence with one mistake of a kind, or None where the kind does not apply."""
    found = list(_CORRUPTIONS[kind](sentence.split(), rng))
    different = [" ".join(words) for words in found if " ".join(words).casefold() != sentence.casefold()]
    return rng.choice(different) if different else None


def _swap(words: list[str], rng: random.Random) -> Iterator[list[str]]:
    """Two neighbours, neither the first word nor one with punctuation or digits."""
    for i in range(1, len(words) - 1):
        if words[i].isalpha() and words[i + 1].isalpha():
            yield [*words[:i], words[i + 1], words[i], *words[i + 2 :]]


def _delete(words: list[str], rng: random.Random) -> Iterator[list[str]]:
    """A word between two others; not a name or number, whose place another could take."""
    for i in range(1, len(words) - 1):
        if words[i].isalpha() and words[i].islower():
            yield [*words[:i], *words[i + 1 :]]


def _ending(words: list[str], rng: random.Random) -> Iterator[list[str]]:
    for i, word in list(enumerate(words))[1:]:
        bare = word.rstrip(".,;:!?")
        for paradigm in ENDINGS:
            ending = next((e for e in sorted(paradigm, key=len, reverse=True) if bare.endswith(e)), None)
            stem = bare[: len(bare) - len(ending)] if ending else ""
            if ending is None or not SHORTEST_STEM <= len(stem) <= LONGEST_STEM or not bare.isalpha():
                continue
            other = rng.choice([e for e in paradigm if e != ending])
            yield [*words[:i], stem + other + word[len(bare) :], *words[i + 1 :]]
            break


def _form(words: list[str], rng: random.Random) -> Iterator[list[str]]:
    for i, word in list(enumerate(words))[1:]:
        bare = word.rstrip(".,;:!?")
        for forms in FORMS:
            if bare.lower() in forms:
                other = rng.choice([form for form in forms if form != bare.lower()])
                other = other.capitalize() if bare[:1].isupper() else other
                yield [*words[:i], other + word[len(bare) :], *words[i + 1 :]]
                break


_CORRUPTIONS: dict[str, Callable[[list[str], random.Random], Iterator[list[str]]]] = {
    "swap": _swap,
    "deletion": _delete,
    "ending": _ending,
    "form": _form,
}


# --- what scores say -----------------------------------------------------------------------------------------------


def sentences_of(pairs: Sequence[Pair]) -> list[str]:
    """All right sentences, then all wrong ones."""
    return [pair.right for pair in pairs] + [pair.wrong for pair in pairs]


def behind_first_word(sentence: str) -> str:
    """What is scored: everything behind the first word, its space included."""
    return sentence[len(sentence.split(maxsplit=1)[0]) :]


def wins_of(right: Sequence[float], wrong: Sequence[float]) -> list[float]:
    """1 for each pair whose right sentence is the likelier one, 0.5 for a tie."""
    return [1.0 if r > w else 0.5 if r == w else 0.0 for r, w in zip(right, wrong, strict=True)]


def score_pairs(pairs: Sequence[Pair], right: Sequence[float], wrong: Sequence[float]) -> dict[str, tuple[float, ...]]:
    """What one model's log-probabilities say of the pairs: each number, and its 95 % interval where it has one.

    `right` and `wrong`: log-probability of each sentence behind its first word, nats.

    accuracy                share of pairs whose right sentence is the likelier one as a whole, 0 to 1; a tie counts
                            half (Wilson's interval); accuracy/KIND is that of one kind of mistake
    accuracy_per_character  the same by the log-probability of a character: as a whole, a sentence with a word left out
                            is nearly always the likelier one, because it is shorter
    bits_per_character      of the right sentences
    correlation             point-biserial, of the log-probability of a character with right (1) and wrong (0), over all
                            2n sentences: what a reward of that kind carries of grammar; 0 where all are alike
    """
    count, wins = len(pairs), wins_of(right, wrong)
    by_kind: dict[str, list[float]] = {}
    for pair, win in zip(pairs, wins, strict=True):
        by_kind.setdefault(pair.kind, []).append(win)
    lengths = [len(behind_first_word(sentence)) for sentence in sentences_of(pairs)]
    each = [value / length for value, length in zip([*right, *wrong], lengths, strict=True)]
    return {
        "accuracy": (sum(wins) / count, *wilson(sum(wins), count)),
        **{f"accuracy/{kind}": (sum(found) / len(found),) for kind, found in sorted(by_kind.items())},
        "accuracy_per_character": (sum(wins_of(each[:count], each[count:])) / count,),
        "bits_per_character": (-sum(right) / math.log(2) / sum(lengths[:count]),),
        "correlation": (correlation(each, [1.0] * count + [0.0] * count),),
    }


def wilson(wins: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    if count == 0:
        return 0.0, 1.0
    share, square = wins / count, z * z
    centre = (share + square / (2 * count)) / (1 + square / count)
    radius = z * math.sqrt(share * (1 - share) / count + square / (4 * count * count)) / (1 + square / count)
    return max(centre - radius, 0.0), min(centre + radius, 1.0)


def correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Pearson's r; 0 where either does not vary."""
    try:
        return statistics.correlation(first, second)
    except statistics.StatisticsError:
        return 0.0


def accuracy_difference(first: Sequence[float], second: Sequence[float], z: float = 1.959964) -> tuple[float, ...]:
    """The first model's accuracy minus the second's, with its 95 % interval, from their wins on the same pairs (paired,
    normal approximation)."""
    both = [a - b for a, b in zip(first, second, strict=True)]
    mean = sum(both) / len(both)
    if len(both) < 2:
        return mean, -1.0, 1.0
    spread = math.sqrt(sum((d - mean) ** 2 for d in both) / (len(both) - 1) / len(both))
    return mean, mean - z * spread, mean + z * spread
