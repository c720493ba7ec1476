"""Is the response like an accepted answer? Each metric is a number from 0 (nothing in common) to 1 (the same).

Pure functions of strings; `similarity` takes the best over the accepted answers. ROUGE-L is rouge-score's, chrF and
BLEU are sacrebleu's, the edit distance is rapidfuzz's; exact match and token F1 are the evaluation's (answers.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rapidfuzz.distance import Levenshtein
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from rewards.answers import composed, exact_match, normalise, token_f1


class _Words:
    """rouge-score's own tokenizer keeps a-z and 0-9 only: it would split `føroyar` and lose every ð."""

    def tokenize(self, text: str) -> list[str]:
        return normalise(text).split()


_ROUGE = RougeScorer(["rougeL"], tokenizer=_Words())
_CHRF = CHRF()
_BLEU = BLEU(effective_order=True)  # answers are often shorter than four words


def rouge_l(response: str, answer: str) -> float:
    """F1 of the longest common subsequence of words (Lin, 2004, section 3.1), case and punctuation aside."""
    return float(_ROUGE.score(answer, response)["rougeL"].fmeasure)


def chrf(response: str, answer: str) -> float:
    """Character n-gram F2, n up to 6 (Popović, 2015): endings that differ cost little."""
    return float(_CHRF.sentence_score(response, [answer]).score) / 100


def bleu(response: str, answer: str) -> float:
    """Smoothed sentence BLEU (Papineni et al., 2002; Chen and Cherry, 2014, method 3), n no longer than the answer."""
    return min(float(_BLEU.sentence_score(response, [answer]).score) / 100, 1.0)


def edit(response: str, answer: str) -> float:
    """1 - Levenshtein distance in characters / length of the longer one, case and punctuation aside."""
    return float(Levenshtein.normalized_similarity(normalise(response), normalise(answer)))


METRICS: Mapping[str, Callable[[str, str], float]] = {
    "rouge_l": rouge_l,
    "chrf": chrf,
    "bleu": bleu,
    "exact_match": lambda response, answer: exact_match(response, [answer]),
    "token_f1": lambda response, answer: token_f1(response, [answer]),
    "edit": edit,
}


def similarity(response: str, answers: Sequence[str], metric: str) -> float:
    """Likeness 0..1 to the nearest accepted answer; 0 for an empty response or where the data has no answer."""
    if not response.strip():
        return 0.0
    said = composed(response)
    return max((METRICS[metric](said, composed(answer)) for answer in answers), default=0.0)
