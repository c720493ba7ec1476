"""Who is compared: the student before its training and after each stage, its teacher, other models, published figures.

Reads evaluation files only; nothing is loaded or measured here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from configs.io.files import read_yaml
from configs.io.results import find_result
from eval.measures.model import output_folder, run_config, run_of
from eval.pages.compare_scores import Score, Scores, read_file, read_folder, read_heldout, read_teacher_check

_config = partial(run_config, needed=("student", "teacher", "data"))
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
    start: str = ""
    """Source of the student before the training that made this one."""
    teacher: str = ""
    """Source of the teacher in that training."""


def entrants_of(runs: Sequence[Path], models: Sequence[str], runs_dir: Path) -> list[Entrant]:
    """All rows but the published ones. Those that share a model directory and a kind are one row."""
    found: list[Entrant] = []
    for run in runs:
        stages = [*_stages_before(run, runs_dir), run]
        several = len(stages) > 1 or len(runs) > 1
        path = str(_config(stages[0])["student"]["path"])
        start = _student(path, "Student before", "before", runs_dir, None, stages[0])
        taught = str(_config(run)["teacher"]["path"])
        teacher = _entrant(taught, "Teacher", "teacher", runs_dir, [run / "eval" / "teacher.json"], run, "teacher")
        after_name = f"After {run.name}" if several else "Student after"
        found.append(start)
        for stage, following in zip(stages, [*stages[1:], None], strict=True):
            name = f"After {stage.name}" if stage != run else after_name
            after = _student(str(stage / "export"), name, "after", runs_dir, stage, following)
            found.append(replace(after, start=start.source, teacher=teacher.source))
        found.append(teacher)
    for model in models:
        found.append(_model(model, runs_dir))
    merged: dict[tuple[str, str], Entrant] = {}
    for one in found:
        key = (one.source, one.kind)
        merged[key] = one if key not in merged else _merged(merged[key], one)
    order = {"before": 0, "after": 1, "model": 2, "teacher": 3}
    rows = sorted((one for one in merged.values() if one.scores), key=lambda one: order[one.kind])
    return with_own_names(rows)


def published(file: Path = PUBLISHED_FILE) -> list[Entrant]:
    """The figures of published.yaml. Raises ValueError where a row is none, or a model's figures are in two."""
    content, found = read_yaml(file), list[Entrant]()
    try:
        for row in content["figures"]:
            source = content["sources"][row["source"]]
            caveat = f"published ({source['title']}): {source['caveat']}"
            scores = {
                f"euroeval/{key}": Score(value=float(value), conditions={"published": row["source"]}, caveat=caveat)
                for key, value in row.items()
                if "/" in key
            }
            one = Entrant(name=str(row["model"]), kind="published", source=str(source["address"]), scores=scores)
            if any((one.name, one.source) == (other.name, other.source) for other in found):
                raise ValueError(f"{one.name!r} of {row['source']} is there twice; write its figures in one row")
            found.append(one)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{file}: figures, row {len(found) + 1}: {what}") from None
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
    files = [run / "eval" / file for run, file in ((trained_by, "after.json"), (started, "before.json")) if run]
    return _entrant(path, name, kind, runs_dir, files, started, "student")


def _model(path: str, runs_dir: Path) -> Entrant:
    folder = output_folder(path, runs_dir)
    if not folder.is_dir():
        raise ValueError(f"--model {path}: no evaluation of it in {folder}; run python eval/measure.py perplexity")
    run = run_of(path)
    return _entrant(path, f"After {run.name}" if run is not None else Path(path).name, "model", runs_dir)


def _entrant(
    path: str,
    name: str,
    kind: str,
    runs_dir: Path,
    heldout: Sequence[Path] = (),
    started: Path | None = None,
    who: str = "",
) -> Entrant:
    """What lies in a model's eval folder, in a run's `heldout` evaluations, which count for more, and in the check of
    the pair at the start of the run `started`, which counts for less."""
    folder = output_folder(path, runs_dir)
    scores = read_folder(folder)
    for file in heldout:
        scores |= read_file(file, read_heldout)
    asked = [one for one in map(find_result, (folder / "heldout.json", *heldout)) if one is not None]
    check = partial(read_teacher_check, who=who)
    return Entrant(
        name=name,
        kind=kind,
        source=str(Path(path).resolve() if Path(path).exists() else path),
        scores=scores if started is None else read_file(started / "eval" / "minimal_pairs.json", check) | scores,
        answers=next((one.rows for one in reversed(asked) if one.rows), ()),
        translations=_translations(folder),
    )


def _translations(folder: Path) -> Mapping[str, Sequence[Mapping[str, Any]]]:
    result = find_result(folder / "translate.json")
    rows = result.rows if result is not None else ()
    return {name: [row for row in rows if row["direction"] == name] for name in {row["direction"]: 0 for row in rows}}


def _merged(first: Entrant, second: Entrant) -> Entrant:
    return replace(
        first,
        scores={**second.scores, **first.scores},
        answers=first.answers or second.answers,
        translations=first.translations or second.translations,
    )


def with_own_names(rows: Sequence[Entrant]) -> list[Entrant]:
    """No two rows have one name: a second one gets the name of its folder, a third one all of its path."""
    named: dict[str, Entrant] = {}
    for row in rows:
        path = Path(row.source)
        folder = path.parent.name if path.name == "export" else path.name
        more = ("", f" ({folder})", f" ({row.source})", f" ({row.source}, {row.kind})")
        name = next(row.name + words for words in more if row.name + words not in named)
        named[name] = replace(row, name=name)
    return list(named.values())
