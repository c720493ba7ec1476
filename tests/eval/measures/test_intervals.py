"""eval/measures/intervals.py against plain resampling loops, sacrebleu's corpus scores and intervals known in closed
form."""

from __future__ import annotations

import random

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from configs.io.results import Value
from eval.measures.intervals import STATISTICS, Examples, difference, interval, means, translations

WRITTEN = ["Hon er heima í dag.", "Bilurin er reyður", "Eg veit ikki.", "hestur", "Tað regnar í Havn."]
REFERENCES = ["Hon er heima í dag.", "Bilurin er bláur.", "Eg veit tað ikki.", "Hesturin rennur.", "Sólin skínur."]


def corpus(examples: Examples) -> float:
    return float(STATISTICS[examples.statistic](examples.columns.sum(0, keepdims=True))[0])


def test_interval_of_a_mean_is_the_normal_one() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(3.0, 2.0, 400)
    found = interval(means([str(i) for i in range(400)], values.tolist()))
    error = values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)
    assert found == interval(means([str(i) for i in range(400)], values.tolist()))  # a fixed seed


def test_pairing_takes_out_what_is_hard_for_both() -> None:
    """Two models that differ by 1 on every example: no doubt about the difference, much about each mean."""
    rng = np.random.default_rng(2)
    hard = rng.normal(50.0, 20.0, 100)
    ids = [f"q{i}" for i in range(100)]
    first, second = means(ids, (hard + 1).tolist()), means(ids[::-1], hard[::-1].tolist())  # in another order
    found, count = difference(first, second) or (None, 0)
    assert count == 100
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((1.0, 1.0, 1.0))
    alone = interval(first)
    assert alone.high - alone.low > 5


def test_only_shared_examples_are_paired() -> None:
    found = difference(means(["a", "b", "c"], [1.0, 2.0, 9.0]), means(["b", "d", "a"], [0.0, 5.0, 4.0]))
    assert found is not None
    assert found[1] == 2
    assert found[0].value == pytest.approx((1 + 2) / 2 - (4 + 0) / 2)
    assert difference(means(["a"], [1.0]), means(["b"], [1.0])) is None
    assert interval(means(["a"], [7.0])) == Value(7.0)  # one example has no interval
    with pytest.raises(ValueError, match="2 ids"):
        means(["a", "a"], [1.0, 2.0])


def test_ratio_resamples_numerator_and_denominator_together() -> None:
    """Bits over bytes, against a loop that draws texts."""
    bits, sizes = [10.0, 200.0, 30.0, 45.0], [5.0, 50.0, 20.0, 9.0]
    examples = Examples(ids=("a", "b", "c", "d"), columns=np.column_stack([bits, sizes]), statistic="ratio")
    found = interval(examples)
    assert found.value == pytest.approx(sum(bits) / sum(sizes))
    rng, loop = random.Random(0), []
    for _ in range(20_000):
        drawn = [rng.randrange(4) for _ in range(4)]
        loop.append(sum(bits[i] for i in drawn) / sum(sizes[i] for i in drawn))
    assert found.low == pytest.approx(np.percentile(loop, 2.5), rel=0.02)
    assert found.high == pytest.approx(np.percentile(loop, 97.5), rel=0.02)


@pytest.mark.parametrize(("name", "metric"), [("chrf", CHRF(word_order=2)), ("bleu", BLEU())])
def test_translation_scores_are_those_of_sacrebleu(name: str, metric: CHRF | BLEU) -> None:
    ids = [str(i) for i in range(len(WRITTEN))]
    examples = translations(ids, WRITTEN, REFERENCES, name)
    assert corpus(examples) == pytest.approx(metric.corpus_score(WRITTEN, [REFERENCES]).score)
    found = interval(examples, resamples=200)
    assert found.low < found.value < found.high
    same, count = difference(examples, examples, resamples=50) or (None, 0)
    assert count == 5
    assert same is not None
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
