"""Intervals of a measure by resampling examples, and of the difference of two models on the same examples.

Percentile bootstrap (Efron and Tibshirani, 1993, chapter 13); paired: both models get the same resamples, so that what
makes an example hard for both cancels (Koehn, 2004). A measure is a function of sums over examples, so a resample is a
row of weights and all resamples together are a matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

Array = NDArray[np.float64]
RESAMPLES = 10_000
SEED = 0
_CELLS = 4_000_000
"""Weights in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """What a measure is made of, one row an example."""

    ids: tuple[str, ...]
    """What an example is called by every model; unique."""
    columns: Array
    """[examples, columns], float64; what the statistic wants summed."""
    statistic: str
    """Name in STATISTICS."""

    def __post_init__(self) -> None:
        if len(set(self.ids)) != len(self.ids) or self.columns.shape[:1] != (len(self.ids),):
            raise ValueError(f"{len(self.ids)} ids ({len(set(self.ids))} different), {self.columns.shape[0]} rows")


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


def ratio(sums: Array) -> Array:
    """First column over second: a mean (second column 1), or bits over bytes. [resamples, 2] to [resamples]."""
    return sums[:, 0] / np.maximum(sums[:, 1], 1e-300)


def percent(sums: Array) -> Array:
    """The same in percent."""
    return 100.0 * ratio(sums)


def matthews(sums: Array) -> Array:
    """Matthews' correlation times 100, for any number of classes (Gorodkin, 2004); columns: the confusion matrix, row
    by row (right label, then given one). 0 where one of the two does not vary."""
    classes = round(sums.shape[1] ** 0.5)
    table = sums.reshape(-1, classes, classes)
    true, given, total = table.sum(2), table.sum(1), table.sum((1, 2))
    above = np.trace(table, axis1=1, axis2=2) * total - (true * given).sum(1)
    below = np.sqrt((total**2 - (given**2).sum(1)) * (total**2 - (true**2).sum(1)))
    return 100.0 * np.where(below > 0, above / np.where(below > 0, below, 1.0), 0.0)


def chrf(sums: Array) -> Array:
    """chrF++ from sacrebleu's counts: [n-grams written, in the reference, in both] for each order."""
    return np.array([_CHRF._compute_f_score(row.tolist()) for row in sums])


def bleu(sums: Array) -> Array:
    """BLEU from sacrebleu's counts: lengths, then right and all n-grams of each order."""
    rows = sums.astype(int).tolist()
    return np.array([BLEU.compute_bleu(r[2:6], r[6:10], r[0], r[1], smooth_method="exp").score for r in rows])


STATISTICS: Mapping[str, Callable[[Array], Array]] = {
    "ratio": ratio,
    "percent": percent,
    "matthews": matthews,
    "chrf": chrf,
    "bleu": bleu,
}
_CHRF = CHRF(word_order=2)
_BLEU = BLEU()


def means(ids: Sequence[str], values: Sequence[float]) -> Examples:
    """The measure is the mean of the values."""
    return Examples(
        ids=tuple(ids), columns=np.column_stack([np.asarray(values, float), np.ones(len(values))]), statistic="ratio"
    )


def labels(ids: Sequence[str], right: Sequence[str], given: Sequence[str]) -> Examples:
    """The measure is Matthews' correlation of two labellings; a given label that is never right is a class too."""
    classes = sorted({*right, *given})
    columns = np.zeros((len(right), len(classes) ** 2))
    places = [classes.index(r) * len(classes) + classes.index(g) for r, g in zip(right, given, strict=True)]
    columns[np.arange(len(right)), places] = 1.0
    return Examples(ids=tuple(ids), columns=columns, statistic="matthews")


def translations(ids: Sequence[str], written: Sequence[str], references: Sequence[str], metric: str) -> Examples:
    """The measure is the corpus's chrF++ (`chrf`) or BLEU (`bleu`), as sacrebleu counts it."""
    # sacrebleu has no public way to the counts of a sentence; tests hold the sums to its public corpus_score.
    counter = {"chrf": _CHRF, "bleu": _BLEU}[metric]
    counts = counter._extract_corpus_statistics(list(written), [list(references)])
    return Examples(ids=tuple(ids), columns=np.asarray(counts, float), statistic=metric)


def interval(examples: Examples, resamples: int = RESAMPLES, seed: int = SEED) -> Interval:
    """The measure over all examples with its interval."""
    statistic = STATISTICS[examples.statistic]
    value = float(statistic(examples.columns.sum(0, keepdims=True))[0])
    drawn = np.concatenate([statistic(w @ examples.columns) for w in _weights(len(examples.ids), resamples, seed)])
    return _percentiles(value, drawn)


def difference(
    first: Examples, second: Examples, resamples: int = RESAMPLES, seed: int = SEED
) -> tuple[Interval, int] | None:
    """(first minus second with its interval, examples paired); None where the two share no example."""
    shared = [name for name in first.ids if name in set(second.ids)]
    if not shared or first.statistic != second.statistic:
        return None
    pair = [_rows(first, shared), _rows(second, shared)]
    statistic = STATISTICS[first.statistic]
    whole = [float(statistic(columns.sum(0, keepdims=True))[0]) for columns in pair]
    drawn = np.concatenate(
        [statistic(w @ pair[0]) - statistic(w @ pair[1]) for w in _weights(len(shared), resamples, seed)]
    )
    return _percentiles(whole[0] - whole[1], drawn), len(shared)


def _rows(examples: Examples, ids: Sequence[str]) -> Array:
    place = {name: row for row, name in enumerate(examples.ids)}
    return examples.columns[[place[name] for name in ids]]


def _weights(count: int, resamples: int, seed: int) -> Iterator[Array]:
    """How often each resample draws each example, [some resamples, examples]; the same for the same count and seed."""
    rng = np.random.default_rng(seed)
    chunk = max(1, _CELLS // count)
    for begin in range(0, resamples, chunk):
        size = min(chunk, resamples - begin)
        yield rng.multinomial(count, np.full(count, 1.0 / count), size=size).astype(np.float64)


def _percentiles(value: float, drawn: Array) -> Interval:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(value, float(low), float(high))
