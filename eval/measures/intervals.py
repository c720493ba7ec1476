"""Intervals of a measure by resampling examples, and of the difference of two models on the same examples.

Percentile bootstrap (Efron and Tibshirani, 1993, chapter 13) by scipy.stats.bootstrap. What is our own: a measure is a
function of column sums over examples, which gives ratios and corpus scores (chrF++, BLEU) an interval as well as means;
and a difference is resampled over the examples that two models share, so that what makes an example hard for both
cancels (Koehn, 2004).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from scipy.stats import bootstrap

from configs.io.results import Value

Array = NDArray[np.float64]
RESAMPLES = 10_000
SEED = 0
_CELLS = 4_000_000
"""Numbers in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """What a measure is made of, one row an example."""

    ids: tuple[str, ...]
    """What an example is called by every model; unique."""
    columns: Array
    """[examples, columns], float64; what the statistic wants summed."""
    statistic: str = "ratio"
    """Name in STATISTICS."""

    def __post_init__(self) -> None:
        if len(set(self.ids)) != len(self.ids) or self.columns.shape[:1] != (len(self.ids),):
            raise ValueError(f"{len(self.ids)} ids ({len(set(self.ids))} different), {self.columns.shape[0]} rows")


def ratio(sums: Array) -> Array:
    """First column over second: a mean (second column 1), or bits over bytes. [..., 2] to [...]."""
    return sums[..., 0] / np.maximum(sums[..., 1], 1e-300)


def chrf(sums: Array) -> Array:
    """chrF++ from sacrebleu's counts: [n-grams written, in the reference, in both] for each order."""
    return np.apply_along_axis(lambda row: _CHRF._compute_f_score(row.tolist()), -1, sums)


def bleu(sums: Array) -> Array:
    """BLEU from sacrebleu's counts: lengths, then right and all n-grams of each order."""

    def score(row: Array) -> float:
        counts = row.astype(int).tolist()
        return float(BLEU.compute_bleu(counts[2:6], counts[6:10], counts[0], counts[1], smooth_method="exp").score)

    return np.apply_along_axis(score, -1, sums)


STATISTICS: Mapping[str, Callable[[Array], Array]] = {"ratio": ratio, "chrf": chrf, "bleu": bleu}
_CHRF = CHRF(word_order=2)
_BLEU = BLEU()


def means(ids: Sequence[str], values: Sequence[float]) -> Examples:
    """The measure is the mean of the values."""
    return Examples(ids=tuple(ids), columns=np.column_stack([np.asarray(values, float), np.ones(len(values))]))


def translations(ids: Sequence[str], written: Sequence[str], references: Sequence[str], metric: str) -> Examples:
    """The measure is the corpus's chrF++ (`chrf`) or BLEU (`bleu`), as sacrebleu counts it."""
    # sacrebleu has no public way to the counts of a sentence; tests hold the sums to its public corpus_score.
    counter = {"chrf": _CHRF, "bleu": _BLEU}[metric]
    counts = counter._extract_corpus_statistics(list(written), [list(references)])
    return Examples(ids=tuple(ids), columns=np.asarray(counts, float), statistic=metric)


def interval(examples: Examples, resamples: int = RESAMPLES, seed: int = SEED) -> Value:
    """The measure over all examples with its 95 % interval (none for a single example)."""
    return _resampled([examples.columns], STATISTICS[examples.statistic], resamples, seed)


def difference(
    first: Examples, second: Examples, resamples: int = RESAMPLES, seed: int = SEED
) -> tuple[Value, int] | None:
    """(first minus second with its interval, examples paired); None where the two share no example."""
    known = set(second.ids)
    shared = [name for name in first.ids if name in known]
    if not shared or first.statistic != second.statistic:
        return None
    pair = [_rows(one, shared) for one in (first, second)]
    return _resampled(pair, STATISTICS[first.statistic], resamples, seed), len(shared)


def _rows(examples: Examples, ids: Sequence[str]) -> Array:
    place = {name: row for row, name in enumerate(examples.ids)}
    return examples.columns[[place[name] for name in ids]]


def _resampled(parts: Sequence[Array], statistic: Callable[[Array], Array], resamples: int, seed: int) -> Value:
    """The statistic of the first part, less that of the second where there is one; both get the same resamples."""

    def of(rows: NDArray[np.int64], axis: int = -1) -> Array:
        """[..., examples] places of examples to [...]."""
        first, *others = (statistic(part[rows].sum(-2)) for part in parts)
        return first - others[0] if others else first

    everything = np.arange(len(parts[0]))
    value = float(of(everything))
    if len(everything) < 2:
        return Value(value)
    drawn = bootstrap(
        (everything,),
        of,
        n_resamples=resamples,
        method="percentile",
        vectorized=True,
        batch=max(1, _CELLS // sum(part.size for part in parts)),
        rng=seed,
    ).confidence_interval
    return Value(value, float(drawn.low), float(drawn.high))
