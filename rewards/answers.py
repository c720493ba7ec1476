"""Is the answer right? SQuAD-style exact match and token F1, over whole Unicode.

Pure functions of strings; the trainer's evaluation, the exact-match reward part and eval/ share them, so that one
number means one thing everywhere.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

ENGLISH_ARTICLES = re.compile(r"\b(a|an|the)\b")


def composed(text: str) -> str:
    """The text with composed letters: `á`, and `a` with U+0301 behind it, are one to who reads them (Unicode's NFC)."""
    return unicodedata.normalize("NFC", text)


def normalise(text: str) -> str:
    """Lower-case, without punctuation and English articles, words parted by single spaces (SQuAD, arXiv 1606.05250).

    The articles are English although the answers are Faroese (where the definite article is a suffix): EuroEval
    scores FoQA with the official SQuAD script, which drops `a`, `an` and `the`, and our figures are to be compared
    with its. `á`, `ein` and other Faroese words stay.
    Two differences from that script, both because it was written for ASCII: punctuation is every Unicode character
    of category P or S (so that “quotes” and – dashes go as well), and composed and decomposed letters
    (`á` and `a` + U+0301) are one.
    """
    text = composed(text).lower()
    text = "".join(char for char in text if unicodedata.category(char)[0] not in "PS")
    return " ".join(ENGLISH_ARTICLES.sub(" ", text).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 where the normalised prediction equals any accepted answer, else 0.0."""
    return float(any(normalise(prediction) == normalise(answer) for answer in _accepted(answers)))


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """Largest F1 (0..1) of the prediction's words against any accepted answer's words, counted as bags."""
    return max(pair_f1(normalise(prediction).split(), normalise(answer).split()) for answer in _accepted(answers))


def answer_row(question: Mapping[str, Any], prediction: str) -> dict[str, Any]:
    """A row of a result: the question (id, question, context, answers), what was said, and f1 and exact_match of that
    in percent."""
    named = ("id", "question", "context", "answers")
    kept = {key: question[key] for key in named if question.get(key) not in (None, "")}
    answers = question["answers"]
    f1, match = 100.0 * token_f1(prediction, answers), 100.0 * exact_match(prediction, answers)
    return {**kept, "prediction": prediction, "f1": f1, "exact_match": match}


def pair_f1(predicted: list[str], expected: list[str]) -> float:
    """F1 of two bags of words; two empty bags agree."""
    if not predicted or not expected:
        return float(predicted == expected)
    common = (Counter(predicted) & Counter(expected)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def open_scores(patterns: Sequence[str], texts: Sequence[str]) -> dict[str, float]:
    """What sampled answers to open questions are worth, each with the pattern (a regular expression) of its question.

    `open_right`: answers that match theirs whole. `open_different`: right answers that differ from the others to the
    same pattern, so that nobody is good who says one thing again and again. Both in percent of all answers."""
    right = right_answers(patterns, texts)
    share = 100.0 / max(len(texts), 1)
    return {"open_right": share * len(right), "open_different": share * len(set(right))}


def right_answers(patterns: Sequence[str], texts: Sequence[str]) -> list[tuple[str, str]]:
    """(pattern, text, composed) of the answers that match the pattern of their question whole."""
    pairs = zip(patterns, map(composed, texts), strict=True)
    return [(pattern, text) for pattern, text in pairs if re.fullmatch(composed(pattern), text)]


def _accepted(answers: Sequence[str]) -> Sequence[str]:
    """The accepted answers, checked: a lone string would be taken for a list of letters."""
    if isinstance(answers, str):
        raise TypeError(f"answers must be a list of strings, got the string {answers!r}")
    if not answers:
        raise ValueError("answers is empty; a question needs at least one accepted answer")
    return answers
