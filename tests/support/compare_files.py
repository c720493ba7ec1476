"""A run's folder with every kind of evaluation, in the formats of the programs that write them, with chosen numbers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

from eval.measures.model import output_folder

WORDS = ["Oslo", "Havn", "Tórshavn", "Klaksvík", "Reykjavík"]


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def evaluation(right: int, questions: int = 40, reverse_kl: float = 1.0, data: str = "h.jsonl") -> dict[str, Any]:
    """A held-out evaluation whose first `right` answers are right and whose others are wrong."""
    rows = [
        {
            "id": f"q{n}", "question": f"Hvat eitur høvuðsstaðurin {n}?", "answers": ["Tórshavn"],
            "context": "Her er Tórshavn." if n % 3 else None,
            "prediction": "Tórshavn" if n < right else WORDS[n % 2], "f1": 100.0 * (n < right),
            "exact_match": 100.0 * (n < right),
        }
        for n in range(questions)
    ]  # fmt: skip
    share = 100.0 * right / questions
    values = {"f1": share, "exact_match": share, "reverse_kl": reverse_kl}
    return result("heldout", data={"path": data, "rows": questions}, values=values, rows=rows)


def result(measure: str, **parts: Any) -> dict[str, Any]:
    """A result file; what `parts` leave out is empty."""
    blank = {"format": 1, "measure": measure, "model": "m", "data": {}, "settings": {}, "versions": {}, "rows": []}
    values = {
        name: one if isinstance(one, dict) else {"value": one}
        for name, one in (parts.pop("values", None) or {}).items()
    }
    return {**blank, **parts, "values": values}


def perplexity(bits: float, texts: int = 12, sha256: str = "f0") -> dict[str, Any]:
    """Texts of 100 bytes and `bits` bits a byte, some of them a little easier."""
    rng = random.Random(0)
    each = [100 * bits + rng.choice([-20, 20]) * (n > 1) for n in range(texts)]
    mean = sum(each) / (100 * texts)
    return result(
        "perplexity",
        data={"fo": {"path": "fo.txt", "sha256": sha256}, "da": {"path": "da.txt", "sha256": "da"}},
        values={"fo/bits_per_byte": mean, "da/bits_per_byte": mean},
        rows=[
            {"text": text, "id": str(n), "bits": one, "bytes": 100}
            for text in ("fo", "da")
            for n, one in enumerate(each)
        ],
    )


def euroeval(mean: float, *, comparable: bool, source: str = "demo") -> dict[str, Any]:
    """Ten iterations, half a point to either side of the mean."""
    scores = [mean - 0.5, mean + 0.5] * 5
    tasks = {"foqa": ("f1", "em"), "scala-fo": ("mcc", "macro_f1")}
    return result(
        "euroeval",
        data={
            task: {"source": source, "id": f"{source}/foqa", "revision": None, "sha256": {"test": "t0"}}
            for task in tasks
        },
        settings={"kind": "base", "iterations": len(scores), "split": "test", "few_shot": True},
        versions={"euroeval": "16.11.0"},
        values={
            f"{task}/{name}": {"value": mean, "low": mean - 2.5, "high": mean + 2.5}
            for task, names in tasks.items()
            for name in names
        },
        rows=[
            {
                "task": task,
                "comparable": comparable,
                "why_not": None if comparable else f"{source} data",
                "generations": f"euroeval/{task}.jsonl",
                "scores": {name: scores for name in names},
            }
            for task, names in tasks.items()
        ],
    )


def translate(written: list[str]) -> dict[str, Any]:
    references = ["Hon er heima í dag.", "Bilurin er bláur.", "Eg veit tað ikki."]
    sources = ["She is at home today.", "The car is blue.", "I do not know."]
    return result(
        "translate",
        data={"eng-fao": {"sha256": "d0"}},
        settings={"few_shot": 5, "chrf_signature": "s", "bleu_signature": "s"},
        values={"eng-fao/chrf": 50.0, "eng-fao/bleu": 50.0},
        rows=[
            {"direction": "eng-fao", "id": str(n), "source": source, "reference": reference, "written": text}
            for n, (source, reference, text) in enumerate(zip(sources, references, written, strict=True))
        ],
    )


def write_run(runs: Path, name: str, student: str, *, right: tuple[int, int, int] = (4, 20, 38)) -> Path:
    """A finished run: held-out evaluations before and after and of the teacher, a few steps of metrics."""
    run = runs / name
    config = {
        "algo": "grpo", "reward": "minillm", "student": {"path": student}, "teacher": {"path": str(runs / "teacher")},
        "data": {"template": "{question}", "heldout": "h.jsonl"}, "sampling": {"max_new_tokens": 8},
    }  # fmt: skip
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    names = {"before": 4.0, "after": 2.0, "teacher": 0.0}
    for (file, reverse_kl), count in zip(names.items(), right, strict=True):
        write_json(run / "eval" / f"{file}.json", evaluation(count, reverse_kl=reverse_kl))
    with (run / "metrics.jsonl").open("w") as out:
        for step in range(1, 31):
            row = {"step": step, "reward/mean": step / 4, "kl/teacher": 3 - step / 20, "length/mean": 9.0}
            out.write(json.dumps(row | {"seconds/sample": 1.0, "seconds/update": 2.0, "seconds/total": 3.5}) + "\n")
    write_json(run / "summary.json", {"status": "finished", "steps": 30, "seconds": {"total": 100.0}})
    return run


def write_everything(runs: Path) -> tuple[Path, Path]:
    """(a run with all evaluations of student and teacher, a model outside of it that was evaluated as well)."""
    start, model = runs / "start", runs / "stranger"
    run = write_run(runs, "one", str(start))
    one = {"accuracy": {"value": 0.6, "low": 0.5, "high": 0.7}, "accuracy_per_character": 0.6,
           "bits_per_character": 1.5, "correlation": 0.1}  # fmt: skip
    both = {f"{who}/{name}": value for who in ("student", "teacher") for name, value in one.items()}
    check = result("teacher_check", data={"path": "fo.txt", "rows": 50}, values=both)
    write_json(run / "eval" / "minimal_pairs.json", check)
    folders = {
        "start": output_folder(start, runs),
        "after": run / "eval",
        "teacher": output_folder(runs / "teacher", runs),
        "model": output_folder(model, runs),
    }
    for name, bits, mean, comparable in (
        ("start", 2.0, 12.0, False),
        ("after", 1.8, 22.0, False),
        ("teacher", 1.5, 61.0, False),
        ("model", 2.5, 41.0, True),
    ):
        write_json(folders[name] / "perplexity.json", perplexity(bits))
        source = "hub" if comparable else "demo"
        write_json(folders[name] / "euroeval.json", euroeval(mean, comparable=comparable, source=source))
    for name, wins in (("start", [1.0, 0.0, 0.5, 0.0]), ("after", [1.0, 1.0, 0.5, 0.0])):
        rows = [{"id": str(n), "win": win} for n, win in enumerate(wins)]
        own = result("minimal_pairs", data={"sha256": "p0"}, values={"accuracy": sum(wins) / 4}, rows=rows)
        write_json(folders[name] / "pairs.json", own)
    write_json(folders["start"] / "translate.json", translate(["Hon er í dag.", "Bilur bláur", "Nei."]))
    after = ["Hon er heima í dag.", "Bilurin er reyður.", "Eg veit ikki."]
    write_json(folders["after"] / "translate.json", translate(after))
    return run, model
