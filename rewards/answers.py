"""Is the answer right? SQuAD-style exact match and token F1, over whole Unicode.

Pure functions of strings; the trainer's evaluation, the exact-match reward part and eval/ share them, so that one
number means one thing everywhere.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

ENGLISH_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise(text: str) -> str:
    """Lower-case, without punctuation and English articles, words parted by single spaces (SQuAD, arXiv 1606.05250).

    The articles are English although the answers are Faroese (where the definite article is a suffix): EuroEval
    scores FoQA with the official SQuAD script, which drops `a`, `an` and `the`, and our figures are to be compared
    with its. `á`, `ein` and other Faroese words stay.
    Two differences from that script, both because it was written for ASCII: punctuation is every Unicode character
    of category P or S (so that “quotes” and – dashes go as well), and composed and decomposed letters
    (`á` and `a` + U+0301) are one.
    """
    text = unicodedata.normalize("NFC", text).lower()
    text = "".join(char for char in text if unicodedata.category(char)[0] not in "PS")
    return " ".join(ENGLISH_ARTICLES.sub(" ", text).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 where the normalised prediction equals any accepted answer, else 0.0."""
    return float(any(normalise(prediction) == normalise(answer) for answer in _accepted(answers)))


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """Largest F1 (0..1) of the prediction's words against any accepted answer's words, counted as bags."""
    return max(_pair_f1(normalise(prediction).split(), normalise(answer).split()) for answer in _accepted(answers))


def score_answers(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Mean F1 and exact match over all questions, in percent (0..100)."""
    if not predictions:
        raise ValueError("score_answers: no predictions; a score needs at least one question")
    pairs = list(zip(predictions, answers, strict=True))
    return {
        "f1": 100.0 * sum(token_f1(prediction, accepted) for prediction, accepted in pairs) / len(pairs),
        "exact_match": 100.0 * sum(exact_match(prediction, accepted) for prediction, accepted in pairs) / len(pairs),
    }


def _pair_f1(predicted: list[str], expected: list[str]) -> float:
    """F1 of two bags of words; two empty bags agree."""
    if not predicted or not expected:
        return float(predicted == expected)
    common = (Counter(predicted) & Counter(expected)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def _accepted(answers: Sequence[str]) -> Sequence[str]:
    """The accepted answers, checked: a lone string would be taken for a list of letters."""
    if isinstance(answers, str):
        raise TypeError(f"answers must be a list of strings, got the string {answers!r}")
    if not answers:
        raise ValueError("answers is empty; a question needs at least one accepted answer")
    return answers
