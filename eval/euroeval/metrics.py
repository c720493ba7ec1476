"""The metrics that EuroEval fetches from the hub as programs, as functions of the same libraries.

`evaluate.load("squad_v2")` downloads a module and runs it. These are the four that the Faroese tasks need, after
huggingface/evaluate's metrics/ (commit of 2026-04-08), so that no network is needed and no downloaded code is run.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from rewards.answers import ENGLISH_ARTICLES, pair_f1


def squad_v2(predictions: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`exact` and `f1` in percent, of rows keyed by id: of rows with one id the last prediction counts, once.

    The ASCII rules of the official script (rewards/answers.py has those for Unicode, which differ in “quotes”).
    """
    said = {row["id"]: row["prediction_text"] for row in predictions}
    golds = {row["id"]: [text for text in row["answers"]["text"] if _words(text)] or [""] for row in references}
    exact = [max(float(_words(gold) == _words(said[key])) for gold in texts) for key, texts in golds.items()]
    f1 = [max(pair_f1(_words(said[key]), _words(gold)) for gold in texts) for key, texts in golds.items()]
    return {"exact": 100.0 * sum(exact) / len(exact), "f1": 100.0 * sum(f1) / len(f1)}


def _words(text: str) -> list[str]:
    bare = "".join(char for char in text.lower() if char not in string.punctuation)
    return ENGLISH_ARTICLES.sub(" ", bare).split()


def seqeval(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """`overall_f1`, 0 to 1: micro-averaged over entities as the package `seqeval` finds them.

    EuroEval hands the labels over in lower case, and for seqeval only a capital O is outside of an entity: spans of
    `o` count as entities too. That is how the leaderboard's figures are made, so it is how these are.
    """
    from seqeval.metrics import classification_report

    report = classification_report(y_true=references, y_pred=predictions, output_dict=True)
    return {"overall_f1": float(report["micro avg"]["f1-score"])}


def matthews_correlation(predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
    """`matthews_correlation`, -1 to 1."""
    from sklearn.metrics import matthews_corrcoef

    return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}


def f1(predictions: Sequence[int], references: Sequence[int], average: str) -> dict[str, float]:
    """`f1`, 0 to 1."""
    from sklearn.metrics import f1_score

    return {"f1": float(f1_score(references, predictions, average=average))}


METRICS: dict[str, Callable[..., dict[str, float]]] = {
    "squad_v2": squad_v2,
    "seqeval": seqeval,
    "matthews_correlation": matthews_correlation,
    "f1": f1,
}


def use_local_metrics(metrics: Sequence[Any]) -> None:
    """Give EuroEval's metrics a local module each; ValueError where one is not known here."""
    for metric in metrics:
        if metric.huggingface_id not in METRICS:
            raise ValueError(f"metric {metric.huggingface_id!r}: not known here; known are {', '.join(METRICS)}")
        metric.metric = SimpleNamespace(compute=METRICS[metric.huggingface_id])  # all that is asked of a module
