"""What the evaluation files of a folder say, as scores with the conditions that they were measured under.

Two scores are comparable where all their conditions are equal. Each reader takes one file's content and gives scores
by key; the keys with their names and units are MEASURES.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.io.jsonl import read_jsonl
from configs.io.results import HELDOUT, Result, Value, find_result
from eval.euroeval.metrics import squad_v2
from eval.measures.intervals import Examples, interval, means, translations
from eval.measures.open_questions import shares
from eval.pages.page_parts import answer_key


@dataclass(frozen=True)
class Measure:
    """A column of the comparison."""

    group: str
    name: str
    higher_is_better: bool
    digits: int


@dataclass(frozen=True, kw_only=True)
class Score(Value):
    """One model on one measure; without an interval where nothing is known of single examples."""

    examples: Examples | None = None
    """For pairing with another model on the same examples."""
    conditions: Mapping[str, str]
    """What must be equal for two scores to be compared, in words."""
    caveat: str | None = None
    """Why it may not be compared with published figures, or what is to be known of it."""


Scores = dict[str, Score]
GROUPS = {
    "heldout": "Held-out questions",
    "open": "Open questions",
    "euroeval": "EuroEval",
    "bits": "Bits a byte",
    "pairs": "Right and wrong sentences",
    "translate": "Translation",
}
_KNOWN = {
    **{f"heldout/{k}": Measure("heldout", name, not k.endswith("kl"), n) for k, (name, _, n) in HELDOUT.items()},
    "open/right": Measure("open", "Right, %", True, 1),
    "open/different": Measure("open", "Right and different, %", True, 1),
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


ASKED = ("template", "prompt", "system_prompt", "chat_template_kwargs", "max_new_tokens")
"""Settings of held-out questions that have to be equal."""
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


def read_heldout(result: Result, folder: Path) -> Scores:
    """A run's before, after or teacher.json, or a model's heldout.json."""
    rows = result.rows
    ids = _names([answer_key(row) for row in rows])
    whole = sorted([answer_key(row), str(row.get("question")), *map(str, row.get("answers") or [])] for row in rows)
    conditions = {
        "questions": _digest(whole),
        "prompt and length": _digest([str(result.settings.get(k)) for k in ASKED]),
    }
    found: Scores = {}
    for key in ("f1", "exact_match"):
        if key in result.values:
            examples = means(ids, [row[key] for row in rows])
            found[f"heldout/{key}"] = _score(result.values[key].value, examples, conditions)
    for key in ("reverse_kl", "open_right", "open_different", "open_kl"):  # of all samples together: no examples
        if key in result.values and math.isfinite(value := result.numbers[key]):
            found[f"heldout/{key}"] = Score(value=value, conditions=conditions)
    return found


def _names(keys: Sequence[str]) -> list[str]:
    """The keys, a repeated one with its count: a question that is there twice takes no interval from the others."""
    seen: Counter[str] = Counter()
    names = []
    for key in keys:
        seen[key] += 1
        names.append(f"{key} ({seen[key]})" if seen[key] > 1 else key)
    return names


def read_open(result: Result, folder: Path) -> Scores:
    """open_questions.json: right and different answers, by pattern."""
    conditions = {
        "questions": str(result.data["sha256"]),
        "prompt and length": _digest([str(result.settings.get(k)) for k in (*ASKED, "samples")]),
    }
    return {
        f"open/{key}": _score(result.values[f"open_{key}"].value, shares(result.rows, key), conditions)
        for key in ("right", "different")
    }


def read_perplexity(result: Result, folder: Path) -> Scores:
    """perplexity.json: bits a byte of each named text."""
    found: Scores = {}
    for name, text in result.data.items():
        rows = [row for row in result.rows if row["text"] == name]
        columns = np.array([[row["bits"], row["bytes"]] for row in rows], float)
        examples = Examples(ids=tuple(row["id"] for row in rows), columns=columns)
        found[f"bits/{name}"] = _score(result.values[f"{name}/bits_per_byte"].value, examples, {"text": text["sha256"]})
    return found


def read_pairs(result: Result, folder: Path) -> Scores:
    """pairs.json: minimal pairs of one model, with its win on each."""
    examples = means([row["id"] for row in result.rows], [100.0 * row["win"] for row in result.rows])
    conditions = {"sentences": str(result.data["sha256"])}
    return {"pairs/accuracy": _score(100.0 * result.values["accuracy"].value, examples, conditions)}


def read_teacher_check(result: Result, folder: Path, who: str) -> Scores:
    """A run's minimal_pairs.json: student or teacher at its start."""
    if not result.values:
        return {}
    one = result.values[f"{who}/accuracy"]
    conditions = {"sentences": f"{result.data['path']}, {result.data['rows']} pairs of the run"}
    low, high = 100.0 * (one.low or 0.0), 100.0 * (one.high or 0.0)
    return {"pairs/accuracy": Score(value=100.0 * one.value, low=low, high=high, conditions=conditions)}


def read_translate(result: Result, folder: Path) -> Scores:
    """translate.json: chrF++ and BLEU of each direction."""
    found: Scores = {}
    for direction, data in result.data.items():
        rows = [row for row in result.rows if row["direction"] == direction]
        ids, written, references = ([row[key] for row in rows] for key in ("id", "written", "reference"))
        for metric in ("chrf", "bleu"):
            conditions = {
                "sentences": data["sha256"],
                "signature": result.settings[f"{metric}_signature"],
                "examples in the prompt": f"{result.settings['few_shot']} {data.get('examples_sha256')}",
            }
            key = f"{direction}/{metric}"
            examples = translations(ids, written, references, metric)
            found[f"translate/{key}"] = _score(result.values[key].value, examples, conditions)
    return found


def read_euroeval(result: Result, folder: Path) -> Scores:
    """euroeval.json: every metric of every task. FoQA's models are paired question by question, from the generations;
    elsewhere by iterations, which draw the same examples for every model."""
    found: Scores = {}
    split = result.settings["split"]
    for row in result.rows:
        task = row["task"]
        data = result.data[task]
        conditions = {
            "data": f"{data['source']} {data['id']}",
            "rows": str(data["sha256"].get(split, data["revision"])),
            "split": split,
            "iterations": str(result.settings["iterations"]),
            "examples in the prompt": str(result.settings["few_shot"]),
            "harness version": result.versions["euroeval"],
        }
        caveat = None if row["comparable"] else str(row["why_not"] or "not the leaderboard's settings")
        for name, scores in row["scores"].items():
            ids = [f"iteration {place}" for place in range(len(scores))]
            found[f"euroeval/{task}/{name}"] = Score(
                **vars(result.values[f"{task}/{name}"]),
                examples=_questions(folder, row, name)
                or (means(ids, scores) if len(scores) >= LEAST_ITERATIONS else None),
                conditions=conditions,
                caveat=caveat,
            )
    return found


def _questions(folder: Path, task: Mapping[str, Any], metric: str) -> Examples | None:
    """FoQA's F1 or exact match by question, as the harness scores it, over the iterations that drew it; None for other
    tasks, or where the generations are not there."""
    file = folder / str(task.get("generations"))
    name = {"f1": "f1", "em": "exact"}.get(metric)
    if name is None or not file.is_file():
        return None
    sums: dict[str, list[float]] = {}
    for row in read_jsonl(file):
        if "answers" not in row:
            return None
        said = {"id": 0, "prediction_text": row["prediction"]["prediction_text"]}
        total = sums.setdefault(str(row["id"]), [0.0, 0.0])
        total[0] += squad_v2([said], [{"id": 0, "answers": row["answers"]}])[name]
        total[1] += 1.0
    return Examples(ids=tuple(sums), columns=np.array(list(sums.values())), statistic="ratio")


READERS: Mapping[str, Callable[[Result, Path], Scores]] = {
    "heldout.json": read_heldout,
    "open_questions.json": read_open,
    "euroeval.json": read_euroeval,
    "perplexity.json": read_perplexity,
    "pairs.json": read_pairs,
    "translate.json": read_translate,
}


def read_folder(folder: Path) -> Scores:
    """All evaluations in a model's eval folder. Raises ValueError for a broken file."""
    found: Scores = {}
    for name, read in READERS.items():
        found |= read_file(folder / name, read)
    return found


def read_file(file: Path, read: Callable[[Result, Path], Scores]) -> Scores:
    """An evaluation, if it is there. Raises ValueError for a broken file."""
    if (result := find_result(file)) is None:
        return {}
    try:
        return read(result, file.parent)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file}: not as this version writes it ({reason}); evaluate again") from None


def _score(value: float, examples: Examples, conditions: Mapping[str, str]) -> Score:
    drawn = interval(examples)
    return Score(value=value, low=drawn.low, high=drawn.high, examples=examples, conditions=conditions)


def _digest(value: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()[:12]
