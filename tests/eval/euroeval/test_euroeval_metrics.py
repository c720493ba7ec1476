"""The metrics that EuroEval would fetch from the hub, against figures worked out by hand."""

from __future__ import annotations

import pytest

from eval.euroeval.metrics import METRICS, squad_v2, use_local_metrics


def said(key: str, text: str) -> dict:
    return {"id": key, "prediction_text": text, "no_answer_probability": 0.0}


def gold(key: str, *texts: str) -> dict:
    return {"id": key, "answers": {"text": list(texts), "answer_start": [0] * len(texts)}}


def test_squad_keys_by_id_and_takes_the_best_answer() -> None:
    predictions = [said("a", "the Oslo, og"), said("b", "havn"), said("a", "the Oslo, og")]
    references = [gold("a", "havn", "oslo"), gold("b", "Havn."), gold("a", "havn", "oslo")]
    # a: words oslo, og against oslo: precision 1/2, recall 1, F1 2/3; b: equal. The second a is the first one.
    assert squad_v2(predictions, references) == pytest.approx({"exact": 50.0, "f1": 100 * (2 / 3 + 1) / 2})


def test_squad_of_nothing() -> None:
    # An answer without a word is an unanswerable question: only an empty answer is right.
    assert squad_v2([said("a", ""), said("b", "x")], [gold("a", "..."), gold("b", "the")]) == {
        "exact": 50.0,
        "f1": 50.0,
    }
    # The script's punctuation is ASCII: these quotes stay.
    assert squad_v2([said("a", "“oslo”")], [gold("a", "oslo")])["exact"] == 0.0


def test_labels() -> None:
    pytest.importorskip("sklearn")
    # Confusion: 1 right of class 1 out of 2, 2 right of class 0 out of 2.
    predictions, references = [1, 0, 0, 0], [1, 1, 0, 0]
    f1 = METRICS["f1"](predictions=predictions, references=references, average="macro")["f1"]
    assert f1 == pytest.approx((2 / 3 + 4 / 5) / 2)
    mcc = METRICS["matthews_correlation"](predictions=predictions, references=references)
    # (TP TN - FP FN) / sqrt(...) = (1*2 - 0*1) / sqrt(1 * 2 * 2 * 3)
    assert mcc["matthews_correlation"] == pytest.approx(2 / 12**0.5)


def test_entities_count_runs_of_a_lower_case_o() -> None:
    pytest.importorskip("seqeval")
    references = [["o", "b-per", "i-per", "o"], ["b-loc", "o", "o"]]
    predictions = [["o", "b-per", "o", "o"], ["b-loc", "o", "o"]]
    f1 = METRICS["seqeval"](predictions=predictions, references=references)["overall_f1"]
    # Of the gold's (o), (per 1-2), (loc) and the prediction's (o), (per 1-1), (loc), two are the same; a run of `o`
    # behind another span is not opened anew.
    assert f1 == pytest.approx(2 / 3)


def test_an_unknown_metric_is_named() -> None:
    class Unknown:
        huggingface_id = "bertscore"

    with pytest.raises(ValueError, match="metric 'bertscore': not known here"):
        use_local_metrics([Unknown()])
