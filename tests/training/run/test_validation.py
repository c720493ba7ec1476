"""Validation in the loop: which questions, what is best, when it ends; and real runs on the tiny demo."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from configs.checks import validate
from configs.schema import DataConfig, EvalConfig, RunConfig
from tests.support.runs import metrics, timeless
from training.data.preflight import check_validation, set_aside
from training.evaluation import note
from training.experience import Prompt
from training.run.run_folder import Progress


def prompt(number: int, question: str | None = None, answers: tuple[str, ...] = ("ja",)) -> Prompt:
    text = question or f"Spurningur {number}?"
    return Prompt(index=number, text=text, tokens=(1,), answers=answers, question=text, context=None, id=str(number))


def config(**settings: Any) -> RunConfig:
    return RunConfig(eval=EvalConfig(every=5, **settings))


def test_questions_are_set_aside_evenly_and_are_not_trained_on() -> None:
    prompts = [prompt(n) for n in range(20)] + [prompt(20, " SPURNINGUR  5?"), prompt(21, answers=())]
    chosen, others = set_aside(prompts, [prompt(0)], config(validation_questions=4))
    # 20 of the 22 fit: one is held out, one has no answers.
    assert [p.index for p in chosen] == [1, 6, 11, 16]
    assert [p.index for p in others] == [n for n in range(22) if n not in (1, 6, 11, 16)]
    chosen, others = set_aside([*prompts[5:10], prompts[20]], [], config(validation_questions=1))
    assert [p.index for p in chosen] == [5]
    assert [p.index for p in others] == [6, 7, 8, 9]  # without its repetition
    with pytest.raises(ValueError, match=r"eval\.validation_questions = 11: is more than half of the 20 RL prompts"):
        set_aside(prompts, [prompt(0)], config(validation_questions=11))
    # The reverse KL needs no answers.
    assert set_aside(prompts, [], config(validation_questions=11, metric="reverse_kl"))[0]


def test_questions_of_a_file_are_nowhere_else() -> None:
    settings = dataclasses.replace(config(), data=DataConfig(validation="v.jsonl"))
    check_validation([prompt(1)], {"data.heldout": [prompt(2)], "data.prompts": []}, settings)
    with pytest.raises(ValueError, match=r"data\.validation = 'v.jsonl': 1 of 2 questions are in data\.heldout too"):
        check_validation([prompt(1), prompt(2)], {"data.heldout": [prompt(9, "spurningur 2?")]}, settings)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"eval": EvalConfig(patience=2)}, "eval.patience"),
        ({"eval": EvalConfig(export="best")}, "eval.export"),
        ({"data": DataConfig(validation="v.jsonl")}, "data.validation"),
        ({"eval": EvalConfig(every=-1)}, "eval.every"),
    ],
)
def test_settings_that_say_nothing_without_validation_are_refused(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=f"^{key} = "):
        validate(RunConfig(**settings))


def test_best_and_patience_by_hand() -> None:
    settings, progress = config(patience=2, metric="f1"), Progress()
    seen = []
    for step, value in ((5, 10.0), (10, 12.0), (15, 12.0), (20, float("nan")), (25, 13.0)):
        progress.step = step
        assert progress.validation_due(settings.eval.every)
        note(progress, value, settings)
        assert not progress.validation_due(settings.eval.every)
        seen.append((progress.best_step, progress.is_best, progress.stopped_early))
    assert seen == [(5, True, False), (10, True, False), (10, False, False), (10, False, True), (25, True, False)]
    progress.step = 26
    assert not progress.validation_due(settings.eval.every)
    assert not progress.is_best


def test_lower_is_better_for_the_reverse_kl() -> None:
    settings, progress = config(metric="reverse_kl"), Progress()
    for step, value in ((5, 2.0), (10, 1.0), (15, 3.0)):
        progress.step = step
        note(progress, value, settings)
    assert (progress.best_step, progress.best_value, progress.stopped_early) == (10, 1.0, False)


# --- real runs -----------------------------------------------------------------------------------------------------

EARLY = ("--eval.every", "2", "--eval.validation_questions", "6", "--eval.patience", "2", "--eval.export", "best",
         "--checkpoint.every", "3", "--checkpoint.keep", "1")  # fmt: skip


Train = Callable[..., Any]


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "eval" / "validation.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "export" / "model.safetensors")


@pytest.fixture(scope="module")
def early(tmp_path_factory: pytest.TempPathFactory, train: Train) -> Path:
    """An unbroken run that is validated every second step and stops early."""
    runs = tmp_path_factory.mktemp("early")
    train(runs, "--steps", "12", "--name", "run", *EARLY)
    return runs / "run"


def test_the_best_checkpoint_is_kept_and_exported(early: Path) -> None:
    rows = lines(early)
    values = [row["f1"] for row in rows]
    best = rows[values.index(max(values))]["step"]  # the first of equals
    assert [row["step"] for row in rows] == list(range(2, best + 5, 2))  # two more that are not better
    assert len(metrics(early)) == best + 4 < 12
    for row in metrics(early):
        found = {key.split("/")[1]: value for key, value in row.items() if key.startswith("validation/")}
        assert found == next(({k: r[k] for k in found} for r in rows if r["step"] == row["step"]), {})
    assert (early / "checkpoints" / "best").read_text() == f"step-{best:06d}"
    assert (early / "checkpoints" / f"step-{best:06d}" / "manifest.json").is_file()  # keep is 1, and it is not newest
    summary = json.loads((early / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["validation"]["stopped_early"] is True
    assert summary["validation"]["exported_step"] == summary["validation"]["best_step"] == best
    page = (early / "report.html").read_text(encoding="utf-8")
    assert "Validation F1" in page
    assert "Validation reverse KL to the teacher" in page


def test_a_resumed_run_decides_as_the_unbroken_one(early: Path, tmp_path: Path, train: Train) -> None:
    """And equals it bit for bit."""
    train(tmp_path, "--steps", "2", "--name", "run", *EARLY)
    run = tmp_path / "run"
    best = int((early / "checkpoints" / "best").read_text().removeprefix("step-"))
    if best == 2:  # what the last step of this part and the best of the whole run are
        assert all(torch.equal(value, weights(early)[name]) for name, value in weights(run).items())
    (run / "checkpoints" / "best").unlink()  # killed before the mark
    with (run / "eval" / "validation.jsonl").open("a") as out:
        out.write('{"step": 4, "f1": 99.0}\n')  # of a step that no checkpoint holds
    with (run / "metrics.jsonl").open("a") as out:
        out.write('{"step": 3, "grad_norm": 9.0}\n{"step": 4, "gr')  # likewise, and half a line
    train(tmp_path, "--steps", "12", "--name", "run", *EARLY)
    assert lines(run) == lines(early)
    assert timeless(metrics(run)) == timeless(metrics(early))
    one, other = weights(early), weights(run)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (run / "checkpoints" / "best").read_text() == (early / "checkpoints" / "best").read_text()
    assert "finished already" in train(tmp_path, "--steps", "12", "--name", "run", *EARLY).stdout


def test_validation_and_a_student_beside_change_no_number_of_training(
    finished_run: Path, tmp_path: Path, train: Train
) -> None:
    """Questions of a file of their own, and the start as the baseline, whose numbers are then those of the start: the
    same three steps as without."""
    start = yaml.safe_load((finished_run / "config.yaml").read_text())["student"]["path"]
    file = tmp_path / "validation.jsonl"
    rows = [{"question": f"Hvat er {n} og {n}?", "answers": [str(2 * n)]} for n in range(5)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = train(
        tmp_path, "--steps", "3", "--checkpoint.every", "2", "--eval.every", "1",
        "--data.validation", str(file), "--eval.metric", "reverse_kl", "--eval.baseline", start,
    )  # fmt: skip
    run = tmp_path / "grpo-minillm"
    with_it = [{k: v for k, v in row.items() if not k.startswith("validation/")} for row in metrics(run)]
    assert timeless(with_it) == timeless(metrics(finished_run))
    assert [row["step"] for row in lines(run)] == [1, 2, 3]
    best = min(lines(run), key=lambda row: row["reverse_kl"])["step"]
    assert [row["best"] for row in lines(run)][best - 1] is True
    one, other = weights(finished_run), weights(run)
    assert all(torch.equal(one[name], other[name]) for name in one)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert settings["eval"]["every"] == 1
    summary = json.loads((run / "summary.json").read_text())
    for name, value in summary["eval_before"].items():
        assert summary["eval_baseline"][name] == pytest.approx(value, abs=1e-4), name
    assert "baseline" in done.stdout
    assert summary["eval_baseline"] != summary["eval_after"]


def test_held_out_questions_as_validation_are_refused(finished_run: Path, tmp_path: Path, train: Train) -> None:
    heldout = yaml.safe_load((finished_run / "config.yaml").read_text())["data"]["heldout"]
    done = train(tmp_path, "--eval.every", "1", "--data.validation", heldout, "--steps", "1", code=2)
    assert "are in data.heldout too" in done.stderr
    assert "Traceback" not in done.stderr
