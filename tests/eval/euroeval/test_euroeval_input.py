"""eval/run_euroeval.py refuses what is wrong within seconds, in one line, and writes nothing then. Needs no extra."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs.io.results import Result, Value
from eval import run_euroeval
from eval.euroeval.data import OFFICIAL, SPLITS, TASKS, check_splits, fingerprint, stage
from eval.euroeval.run import _key, _with_finished
from eval.measures import model as model_module
from eval.measures.model import Model
from eval.run_euroeval import INSTALL, main
from training.data.demo.splits import ROWS, build_demo_splits, write_demo_splits

Row = dict[str, Any]


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("splits")
    write_demo_splits(folder)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory that passes for a model until it is loaded."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / file).write_text("{}")
    return folder


def change(file: Path, row: int, edit: Callable[[Row], object]) -> None:
    """Edit one row of a JSONL file, counted from 1."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    edit(rows[row - 1])
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))


def keep(file: Path, rows: int) -> None:
    file.write_text("".join(f"{line}\n" for line in file.read_text().splitlines()[:rows]))


def without_entities(file: Path) -> None:
    for row in range(8, ROWS["train"] + 1):
        change(file, row, lambda one: one.update(labels=["O"] * len(one["labels"])))


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda d: shutil.rmtree(d / "fone"), "fone: no such folder; fone needs train.jsonl, val.jsonl"),
    "no file": (lambda d: (d / "foqa/val.jsonl").unlink(), "foqa/val.jsonl: no such file"),
    "no JSON": (lambda d: (d / "foqa/test.jsonl").write_text("{"), "foqa/test.jsonl:1: "),
    "wrong columns": (
        lambda d: change(d / "foqa/test.jsonl", 3, lambda row: row.pop("context")),
        "foqa/test.jsonl:3: key 'context' must be a string that is not empty; columns here: answers, id, question",
    ),
    "answers": (
        lambda d: change(d / "foqa/test.jsonl", 2, lambda row: row.update(answers=["x"])),
        "foqa/test.jsonl:2: key 'answers' must be",
    ),
    "same id": (
        lambda d: change(d / "foqa/test.jsonl", 7, lambda row: row.update(id="test-001")),
        "foqa/test.jsonl: rows 2 and 7 have the same id 'test-001'",
    ),
    "unknown label": (
        lambda d: change(d / "fosent/train.jsonl", 5, lambda row: row.update(label="gott")),
        "fosent/train.jsonl:5: unknown label 'gott'; known are positive, neutral, negative",
    ),
    "unknown tag": (
        lambda d: change(d / "fone/val.jsonl", 4, lambda row: row["labels"].__setitem__(0, "B-BÓK")),
        "fone/val.jsonl:4: unknown label 'B-BÓK'; known are O, B-LOC",
    ),
    "too few labels": (
        lambda d: change(d / "fone/val.jsonl", 4, lambda row: row["labels"].pop()),
        "fone/val.jsonl:4: 6 tokens and 5 labels",
    ),
    "few questions": (
        lambda d: keep(d / "foqa/train.jsonl", 3),
        "foqa/train.jsonl: 3 different contexts; foqa shows 4 examples",
    ),
    "few sentences": (
        lambda d: keep(d / "scala-fo/train.jsonl", 11),
        "scala-fo/train.jsonl: 11 different texts; scala-fo shows 12 examples",
    ),
    "few entities": (
        lambda d: without_entities(d / "fone/train.jsonl"),
        "fone/train.jsonl: 7 different sentences with entities; fone shows 8 examples",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_splits(case: str, splits: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    break_it, message = CASES[case]
    folder = tmp_path / "data"
    shutil.copytree(splits, folder)
    break_it(folder)
    if case == "too few labels":  # what the fourth row happens to be
        tokens = json.loads((folder / "fone/val.jsonl").read_text().splitlines()[3])["tokens"]
        message = f"fone/val.jsonl:4: {len(tokens)} tokens and {len(tokens) - 1} labels"
    refused(["--model", str(model), "--data", str(folder)], message, tmp_path, capsys)


def refused(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, soon, and nothing written."""
    start = time.process_time()
    assert main([*arguments, "--runs_dir", str(tmp_path / "runs"), "--cache_dir", str(tmp_path / "cache")]) == 2
    assert time.process_time() - start < 10
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("model.safetensors", "no weights (*.safetensors) in it"),
        ("tokenizer.json", "no tokenizer in it"),
        ("config.json", "no config.json in it"),
    ],
)
def test_half_a_model(
    file: str, message: str, splits: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / file).unlink()
    refused(["--model", str(model), "--data", str(splits)], message, tmp_path, capsys)


def test_half_an_adapter(splits: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "nowhere")}))
    arguments = ["--model", str(model), "--data", str(splits)]
    refused(arguments, "no weights (adapter_model.safetensors)", tmp_path, capsys)
    (model / "adapter_model.safetensors").touch()
    refused(arguments, "nowhere: no such directory", tmp_path, capsys)


def test_no_hub_and_no_splits(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tests run with HF_HUB_OFFLINE; without the extra the first thing missing is named."""
    arguments = ["--model", str(model), "--runs_dir", str(tmp_path), "--cache_dir", str(tmp_path)]
    assert main(arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "no data: the hub does not answer (OfflineModeIsEnabled" in line or INSTALL in line


def test_the_extra_is_missing(
    splits: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = run_euroeval.importlib.util.find_spec
    monkeypatch.setattr(
        run_euroeval.importlib.util, "find_spec", lambda name, *more: None if name == "euroeval" else find(name, *more)
    )
    refused(["--model", str(model), "--data", str(splits)], INSTALL, tmp_path, capsys)


def test_results_of_a_hub_id_lie_where_those_of_a_measure_do(
    splits: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so where eval/compare.py looks for them; not in a folder named after the commit in the hub's cache."""
    find, asked = run_euroeval.importlib.util.find_spec, []
    monkeypatch.setattr(model_module, "find_model", lambda key, path: model if path == "org/name" else Path(path))
    monkeypatch.setattr(
        run_euroeval.importlib.util, "find_spec", lambda name, *more: name == "euroeval" or find(name, *more)
    )

    def evaluate(found: Model, *more: object) -> None:
        asked.append(found.folder)
        raise ValueError("far enough")

    monkeypatch.setattr(run_euroeval, "evaluate", evaluate)
    assert main(["--model", "org/name", "--data", str(splits), "--runs_dir", str(tmp_path / "runs")]) == 2
    assert asked == [Model(path="org/name", runs_dir=tmp_path / "runs").folder]


def test_tasks_that_are_not_asked_for_this_time_stay_in_the_file(tmp_path: Path) -> None:
    """Where they were asked in the same way; of another model or with other settings they go."""
    file, about = tmp_path / "euroeval.json", {"sha256": {"test": "x"}}
    same, other = _key("this model", about), _key("another", about)
    blank = Result(measure="euroeval", model="m", data={}, settings={}, versions={}, values={}, rows=[])
    rows = [{"task": "foqa", "key": same}, {"task": "fone", "key": same}, {"task": "fosent", "key": other}]
    names = [str(row["task"]) for row in rows]
    values = {f"{name}/f1": Value(float(place)) for place, name in enumerate(names)}
    replace(blank, data=dict.fromkeys(names, about), values=values, rows=rows).write(file)
    kept = _with_finished(blank, file, {"foqa": same}, "this model")
    assert [row["task"] for row in kept.rows] == list(kept.data) == ["foqa", "fone"]
    assert kept.numbers == {"foqa/f1": 0.0, "fone/f1": 1.0}
    anew = _with_finished(blank, file, {"foqa": _key("this model", {"sha256": {"test": "y"}})}, "this model")
    assert [row["task"] for row in anew.rows] == ["fone"]


# --- the demo's splits ---------------------------------------------------------------------------------------------


def test_demo_splits_are_right(splits: Path) -> None:
    check_splits(splits, OFFICIAL)
    for task, parts in build_demo_splits().items():
        assert {split: len(rows) for split, rows in parts.items()} == ROWS
        keys = [json.dumps(row.get("tokens") or row.get("text") or row["context"]) for s in SPLITS for row in parts[s]]
        assert len(set(keys)) == len(keys), f"{task}: a row is in two splits"
    for row in build_demo_splits()["foqa"]["test"]:
        [text], [start] = row["answers"]["text"], row["answers"]["answer_start"]
        assert row["context"][start : start + len(text)] == text
    for rows in build_demo_splits()["scala-fo"].values():
        assert sum(row["label"] == "correct" for row in rows) * 2 == len(rows)
    for rows in build_demo_splits()["fone"].values():
        for row in rows:
            inside = [token for token, label in zip(row["tokens"], row["labels"], strict=True) if label != "O"]
            assert inside
            assert any(token[0].isupper() for token in inside)


def test_staged_splits_have_one_schema_and_the_same_rows(splits: Path, tmp_path: Path) -> None:
    change(folder := Path(shutil.copytree(splits, tmp_path / "data")) / "fone/train.jsonl", 1, lambda r: r.update(x=1))
    place = stage(folder.parent.parent, tmp_path / "staged", "fone")
    rows = [json.loads(line) for line in (place / "train.jsonl").read_text().splitlines()]
    assert all(set(row) == {"tokens", "labels"} for row in rows)
    original = [json.loads(line) for line in (splits / "fone/train.jsonl").read_text().splitlines()]
    assert fingerprint(rows) == fingerprint(original)
    assert fingerprint(rows) != fingerprint(rows[1:])
    assert "split: val\n    path: val.jsonl" in (place / "README.md").read_text()
    assert set(TASKS) > set(OFFICIAL)
