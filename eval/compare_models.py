"""Who is compared: the student before its training and after each stage, its teacher, other models, published figures.

Reads evaluation files only; nothing is loaded or measured here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from eval.compare_scores import Score, Scores, read_folder, read_heldout, read_teacher_check
from eval.model_dirs import output_folder, run_of
from eval.run_files import read_json

PUBLISHED_FILE = Path(__file__).with_name("published.yaml")


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """A row of the comparison."""

    name: str
    """As the tables call it."""
    kind: str
    """`before`, `after`, `teacher`, `model` or `published`."""
    source: str
    """Model directory, or where the figure was published."""
    scores: Scores
    """By key."""
    answers: Sequence[Mapping[str, Any]] = ()
    """Of the held-out evaluation, each with `prediction` and `f1`."""
    translations: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """By direction: sentences with `source`, `reference` and `written`."""


def entrants_of(runs: Sequence[Path], models: Sequence[str], runs_dir: Path) -> list[Entrant]:
    """All rows but the published ones. Those that share a model directory and a kind are one row."""
    found: list[Entrant] = []
    for run in runs:
        stages = [*_stages_before(run, runs_dir), run]
        several = len(stages) > 1 or len(runs) > 1
        start = str(_config(stages[0])["student"]["path"])
        after_name = f"After {run.name}" if several else "Student after"
        found.append(_student(start, "Student before", "before", runs_dir, None, stages[0]))
        for stage, following in zip(stages, [*stages[1:], None], strict=True):
            name = f"After {stage.name}" if stage != run else after_name
            found.append(_student(str(stage / "export"), name, "after", runs_dir, stage, following))
        found.append(_teacher(run, runs_dir))
    for model in models:
        found.append(_model(model, runs_dir))
    merged: dict[tuple[str, str], Entrant] = {}
    for one in found:
        key = (one.source, one.kind)
        merged[key] = one if key not in merged else _merged(merged[key], one)
    order = {"before": 0, "after": 1, "model": 2, "teacher": 3}
    rows = sorted((one for one in merged.values() if one.scores), key=lambda one: order[one.kind])
    return _with_own_names(rows)


def published(file: Path = PUBLISHED_FILE) -> list[Entrant]:
    """The figures of published.yaml."""
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    found = []
    for row in content["figures"]:
        source = content["sources"][row["source"]]
        caveat = f"published ({source['title']}): {source['caveat']}"
        scores = {
            f"euroeval/{key}": Score(value=float(value), conditions={"published": row["source"]}, caveat=caveat)
            for key, value in row.items()
            if "/" in key
        }
        found.append(Entrant(name=row["model"], kind="published", source=source["address"], scores=scores))
    return found


def _stages_before(run: Path, runs_dir: Path) -> list[Path]:
    """The runs whose exports this run started from, the first one first."""
    stages: list[Path] = []
    earlier = run_of(_config(run)["student"]["path"])
    while earlier is not None and earlier.resolve() not in [stage.resolve() for stage in (run, *stages)]:
        stages.insert(0, earlier)
        earlier = run_of(_config(earlier)["student"]["path"])
    return stages


def _student(path: str, name: str, kind: str, runs_dir: Path, trained_by: Path | None, started: Path | None) -> Entrant:
    """The student as `trained_by` left it and `started` found it."""
    folder = output_folder(path, runs_dir)
    scores, answers = _model_scores(folder)
    for run, file in ((trained_by, "after.json"), (started, "before.json")):
        content = read_json(run / "eval" / file) if run is not None else {}
        if run is not None and content:
            scores |= read_heldout(content, _asked(run))
            answers = content.get("answers") or answers
    if trained_by is not None and "heldout/f1" not in scores:  # stage 1 has no file of its answers
        summary = read_json(trained_by / "summary.json").get("eval_after")
        if isinstance(summary, dict):
            data = str(_config(trained_by)["data"].get("heldout"))
            scores |= read_heldout({**summary, "data": data}, _asked(trained_by))
    if started is not None:
        found = read_teacher_check(read_json(started / "eval" / "minimal_pairs.json"), "student")
        scores = {**found, **scores}
    return Entrant(
        name=name, kind=kind, source=str(Path(path).resolve()), scores=scores, answers=answers,
        translations=_translations(folder),
    )  # fmt: skip


def _teacher(run: Path, runs_dir: Path) -> Entrant:
    path = str(_config(run)["teacher"]["path"])
    scores, answers = _model_scores(output_folder(path, runs_dir))
    content = read_json(run / "eval" / "teacher.json")
    if content:
        scores |= read_heldout(content, _asked(run))
        answers = content.get("answers") or answers
    scores = {**read_teacher_check(read_json(run / "eval" / "minimal_pairs.json"), "teacher"), **scores}
    return Entrant(
        name="Teacher", kind="teacher", source=str(Path(path).resolve()), scores=scores, answers=answers,
        translations=_translations(output_folder(path, runs_dir)),
    )  # fmt: skip


def _model(path: str, runs_dir: Path) -> Entrant:
    folder = output_folder(path, runs_dir)
    if not folder.is_dir():
        raise ValueError(
            f"--model {path}: no evaluation of it in {folder}; run one first, such as python eval/perplexity.py"
        )
    scores, answers = _model_scores(folder)
    run = run_of(path)
    name = f"After {run.name}" if run is not None else Path(path).name
    source = str(Path(path).resolve() if Path(path).exists() else path)
    return Entrant(
        name=name, kind="model", source=source, scores=scores, answers=answers, translations=_translations(folder)
    )


def _model_scores(folder: Path) -> tuple[Scores, Sequence[Mapping[str, Any]]]:
    """What lies in a model's eval folder: (scores, held-out answers)."""
    scores = read_folder(folder)
    content = read_json(folder / "heldout.json")
    if content:
        settings = content.get("settings") or {}
        asked = _digest_of(settings, settings.get("max_new_tokens"))
        scores = {**read_heldout(content, asked), **scores}
    return scores, content.get("answers") or ()


def _translations(folder: Path) -> Mapping[str, Sequence[Mapping[str, Any]]]:
    content = read_json(folder / "translate.json")
    return {direction: one["sentences"] for direction, one in (content.get("directions") or {}).items()}


def _config(run: Path) -> dict[str, Any]:
    """config.yaml. Raises ValueError where it is not one of a run."""
    file = run / "config.yaml"
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict) or not {"student", "teacher", "data"} <= content.keys():
        raise ValueError(f"--run {run}: no config.yaml of a run in it; give the folder of a run (runs/NAME)")
    return content


def _asked(run: Path) -> str:
    """How a run put its questions, in short."""
    config = _config(run)
    return _digest_of(config["data"], (config.get("sampling") or {}).get("max_new_tokens"))


def _digest_of(settings: Mapping[str, Any], longest: object) -> str:
    keys = ("template", "context_template", "use_chat_template")
    return " | ".join([*(str(settings.get(key)) for key in keys), f"at most {longest} tokens"])


def _merged(first: Entrant, second: Entrant) -> Entrant:
    return replace(
        first,
        scores={**second.scores, **first.scores},
        answers=first.answers or second.answers,
        translations=first.translations or second.translations,
    )


def _with_own_names(rows: Sequence[Entrant]) -> list[Entrant]:
    """No two rows have one name: a second one gets the name of its folder."""
    seen: dict[str, int] = {}
    named = []
    for row in rows:
        count = seen.get(row.name, 0)
        seen[row.name] = count + 1
        path = Path(row.source)
        folder = path.parent.name if path.name == "export" else path.name
        named.append(row if count == 0 else replace(row, name=f"{row.name} ({folder})"))
    return named
