"""What the evaluation files of a folder say, as scores with the conditions that they were measured under.

Two scores are comparable where all their conditions are equal. Each reader takes one file's content and gives scores
by key; the keys with their names and units are MEASURES.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from configs.jsonl import read_jsonl
from eval.bootstrap import Examples, Interval, interval, means, translations
from eval.page_parts import answer_key
from eval.run_files import is_number, read_json
from rewards.answers import exact_match, token_f1


@dataclass(frozen=True)
class Measure:
    """A column of the comparison."""

    group: str
    name: str
    higher_is_better: bool
    digits: int


@dataclass(frozen=True, kw_only=True)
class Score:
    """One model on one measure."""

    value: float
    interval: Interval | None = None
    """95 %; None where nothing is known of single examples."""
    examples: Examples | None = None
    """For pairing with another model on the same examples."""
    conditions: Mapping[str, str]
    """What must be equal for two scores to be compared, in words."""
    caveat: str | None = None
    """Why it may not be compared with published figures, or what is to be known of it."""


Scores = dict[str, Score]
GROUPS = {
    "heldout": "Held-out questions",
    "euroeval": "EuroEval",
    "bits": "Bits a byte",
    "pairs": "Right and wrong sentences",
    "translate": "Translation",
}
_KNOWN = {
    "heldout/f1": Measure("heldout", "F1, %", True, 1),
    "heldout/exact_match": Measure("heldout", "Exact match, %", True, 1),
    "heldout/reverse_kl": Measure("heldout", "Reverse KL, nats a token", False, 3),
    "euroeval/foqa/f1": Measure("euroeval", "FoQA F1", True, 1),
    "euroeval/foqa/em": Measure("euroeval", "FoQA exact match", True, 1),
    "euroeval/scala-fo/mcc": Measure("euroeval", "ScaLA-fo MCC", True, 1),
    "euroeval/scala-fo/macro_f1": Measure("euroeval", "ScaLA-fo macro F1", True, 1),
    "euroeval/fone/micro_f1_no_misc": Measure("euroeval", "FoNE F1, no MISC", True, 1),
    "euroeval/fone/micro_f1": Measure("euroeval", "FoNE F1", True, 1),
    "euroeval/fosent/mcc": Measure("euroeval", "FoSent MCC", True, 1),
    "euroeval/fosent/macro_f1": Measure("euroeval", "FoSent macro F1", True, 1),
    "pairs/accuracy": Measure("pairs", "Right one likelier, %", True, 1),
}
ORDER = tuple(_KNOWN)
LANGUAGES = {
    "fo": "Faroese", "da": "Danish", "is": "Icelandic", "en": "English", "no": "Norwegian", "sv": "Swedish",
    "fao": "Faroese", "dan": "Danish", "eng": "English", "isl": "Icelandic",
}  # fmt: skip


LEAST_ITERATIONS = 8
"""Of the harness; an interval from fewer of them is too narrow."""


def measure(key: str) -> Measure:
    """The column of a key; what is not known by name is called as its file calls it."""
    if key in _KNOWN:
        return _KNOWN[key]
    group, _, rest = key.partition("/")
    if group == "bits":
        return Measure(group, LANGUAGES.get(rest, rest), False, 3)
    if group == "translate":
        direction, _, metric = rest.partition("/")
        pair = " to ".join(LANGUAGES.get(side, side) for side in direction.split("-"))
        return Measure(group, f"{pair}, {'chrF++' if metric == 'chrf' else 'BLEU'}", True, 1)
    return Measure(group, rest.replace("/", " "), True, 1)


def read_heldout(content: Mapping[str, Any], asked: str) -> Scores:
    """before, after, teacher or heldout.json. `asked`: how the questions were put."""
    rows = content.get("answers") or []
    ids = [answer_key(row) for row in rows]
    whole = sorted([answer_key(row), str(row.get("question")), *map(str, row.get("answers") or [])] for row in rows)
    conditions = {"questions": _digest(whole) if rows else str(content.get("data")), "prompt and length": asked}
    found: Scores = {}
    for key, of_row in (("f1", _f1), ("exact_match", _exact)):
        if is_number(content.get(key)):
            examples = means(ids, [of_row(row) for row in rows]) if rows and len(set(ids)) == len(ids) else None
            found[f"heldout/{key}"] = _score(float(content[key]), examples, conditions)
    if is_number(content.get("reverse_kl")):
        found["heldout/reverse_kl"] = Score(value=float(content["reverse_kl"]), conditions=conditions)
    return found


def _f1(row: Mapping[str, Any]) -> float:
    return float(row["f1"])


def _exact(row: Mapping[str, Any]) -> float:
    return 100.0 * exact_match(row["prediction"], row["answers"])


def read_perplexity(content: Mapping[str, Any]) -> Scores:
    """perplexity.json: bits a byte of each named text."""
    found: Scores = {}
    for name, text in content["texts"].items():
        rows = [(str(place), one[0], one[1]) for place, one in enumerate(text["each"]) if one is not None]
        columns = np.array([[bits, size] for _, bits, size in rows], float)
        examples = Examples(ids=tuple(place for place, *_ in rows), columns=columns, statistic="ratio")
        conditions = {"text": text["sha256"]}
        found[f"bits/{name}"] = _score(float(text["bits_per_byte"]), examples, conditions)
    return found


def read_pairs(content: Mapping[str, Any]) -> Scores:
    """pairs.json: minimal pairs of one model, with its win on each."""
    ids = [str(place) for place in range(len(content["wins"]))]
    examples = means(ids, [100.0 * win for win in content["wins"]])
    return {
        "pairs/accuracy": _score(100.0 * float(content["accuracy"]), examples, {"sentences": str(content["sha256"])})
    }


def read_teacher_check(content: Mapping[str, Any], who: str) -> Scores:
    """A run's minimal_pairs.json: student or teacher at its start."""
    one = content.get(who)
    if not one:
        return {}
    conditions = {"sentences": f"{content.get('text')}, {content.get('pairs')} pairs of the run"}
    value = 100.0 * float(one["accuracy"])
    found = Interval(value, 100.0 * float(one["low"]), 100.0 * float(one["high"]))
    return {"pairs/accuracy": Score(value=value, interval=found, conditions=conditions)}


def read_translate(content: Mapping[str, Any]) -> Scores:
    """translate.json: chrF++ and BLEU of each direction."""
    found: Scores = {}
    for direction, one in content["directions"].items():
        rows = one["sentences"]
        for metric in ("chrf", "bleu"):
            examples = translations(
                [str(row["id"]) for row in rows], [row["written"] for row in rows], [row["reference"] for row in rows],
                metric,
            )  # fmt: skip
            conditions = {
                "sentences": one["data"]["sha256"],
                "signature": one["metrics"][metric]["signature"],
                "examples in the prompt": str(one["few_shot"]),
            }
            found[f"translate/{direction}/{metric}"] = _score(
                float(one["metrics"][metric]["score"]), examples, conditions
            )
    return found


def read_euroeval(content: Mapping[str, Any], folder: Path) -> Scores:
    """euroeval.json: every metric of every task. FoQA's models are paired question by question, from the generations;
    elsewhere by iterations, which draw the same examples for every model."""
    settings, harness = content.get("settings") or {}, content.get("harness") or {}
    found: Scores = {}
    for task, one in content["tasks"].items():
        data = one.get("data") or {}
        split = str(settings.get("split"))
        conditions = {
            "data": f"{data.get('source')} {data.get('id')}",
            "rows": str((data.get("sha256") or {}).get(split, data.get("revision"))),
            "split": split,
            "iterations": str(settings.get("iterations")),
            "examples in the prompt": str(settings.get("few_shot")),
            "harness version": str(harness.get("euroeval")),
        }
        caveat = None if one.get("comparable") else str(one.get("why_not") or "not the leaderboard's settings")
        for name, metric in one["metrics"].items():
            scores = [float(value) for value in metric.get("scores") or []]
            ids = [f"iteration {place}" for place in range(len(scores))]
            value, radius = float(metric["mean"]), metric.get("ci95")
            found[f"euroeval/{task}/{name}"] = Score(
                value=value,
                interval=Interval(value, value - radius, value + radius) if is_number(radius) else None,
                examples=_questions(folder, one, name)
                or (means(ids, scores) if len(scores) >= LEAST_ITERATIONS else None),
                conditions=conditions,
                caveat=caveat,
            )
    return found


def _questions(folder: Path, task: Mapping[str, Any], metric: str) -> Examples | None:
    """FoQA's F1 or exact match by question, over the iterations that drew it; None for other tasks, or where the
    generations are not there."""
    file = folder / str(task.get("generations"))
    of_row = {"f1": token_f1, "em": exact_match}.get(metric)
    if of_row is None or not file.is_file():
        return None
    sums: dict[str, list[float]] = {}
    for row in read_jsonl(file):
        if "answers" not in row:
            return None
        total = sums.setdefault(str(row["id"]), [0.0, 0.0])
        total[0] += 100.0 * of_row(row["prediction"]["prediction_text"], row["answers"]["text"])
        total[1] += 1.0
    return Examples(ids=tuple(sums), columns=np.array(list(sums.values())), statistic="ratio")


Reader = Callable[[Mapping[str, Any]], Scores]
READERS: Mapping[str, Reader] = {
    "perplexity.json": read_perplexity,
    "pairs.json": read_pairs,
    "translate.json": read_translate,
}


def read_folder(folder: Path) -> Scores:
    """All evaluations in a model's eval folder but the held-out questions. Raises ValueError for a broken file."""
    found: Scores = {}
    readers: dict[str, Reader] = {"euroeval.json": partial(read_euroeval, folder=folder), **READERS}
    for name, read in readers.items():
        content = read_json(folder / name)
        if content:
            try:
                found |= read(content)
            except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise ValueError(f"{folder / name}: not as this version writes it ({reason}); evaluate again") from None
    return found


def _score(value: float, examples: Examples | None, conditions: Mapping[str, str]) -> Score:
    found = None if examples is None or len(examples.ids) < 2 else interval(examples)
    return Score(value=value, interval=found, examples=examples, conditions=conditions)


def _digest(value: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()[:12]
