"""Whole runs of the real processes on the tiny demo: DeepSpeed actor and critic, Megatron teacher."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from configs.io.results import read_result
from tests.support.forked import finish_forked, finish_ranks
from tests.support.runs import ROOT, command, metrics, timeless
from tests.support.teacher_servers import SECRET

PYTHON = sys.executable


def test_the_run_folder_holds_what_the_documentation_says(finished_run: Path) -> None:
    summary = json.loads((finished_run / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert (summary["algo"], summary["reward"], summary["steps"]) == ("grpo", "minillm", 3)
    assert set(summary["seconds"]) == {"total", "sample", "teacher", "reference", "update"}
    assert summary["seconds"]["total"] >= summary["seconds"]["sample"] + summary["seconds"]["update"]
    rows = metrics(finished_run)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert summary["tokens"]["sampled"] == sum(row["tokens/sampled"] for row in rows) > 0
    assert summary["tokens"]["scored"] == summary["tokens"]["sampled"]
    for name in ("eval_before", "eval_after", "teacher_eval"):
        assert set(summary[name]) == {
            "f1", "exact_match", "reverse_kl", "open_right", "open_different", "open_kl"
        }  # fmt: skip
        assert all(math.isfinite(v) for v in summary[name].values())
    assert summary["eval_before"]["reverse_kl"] > 0
    assert (finished_run / "report.html").stat().st_size > 10_000
    assert yaml.safe_load((finished_run / "config.yaml").read_text())["student"]["path"] != "demo"
    samples = [json.loads(line) for line in (finished_run / "samples.jsonl").read_text().splitlines()]
    assert len(samples[0]["responses"]) == 4
    assert list((finished_run / "tensorboard").glob("events.*"))
    assert (finished_run / "checkpoints" / "latest").read_text() == "step-000003"


def test_at_the_first_step_ratio_is_one_and_sampling_equals_training(finished_run: Path) -> None:
    first = metrics(finished_run)[0]
    assert first["mismatch/max"] < 1e-4
    assert first["clip_share"] == 0.0
    # Exact KL over the vocabulary and its estimate from the samples agree roughly; both are positive here.
    assert first["loss/single_step"] > 0
    assert first["kl/teacher"] == pytest.approx(first["loss/single_step"], rel=0.5)
    assert first["grad_norm"] > 0


def test_the_export_loads_in_plain_transformers_and_differs_from_the_start(finished_run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished_run / "export")
    tokenizer = AutoTokenizer.from_pretrained(finished_run / "export")
    ids = tokenizer("Land: Danmark.", return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(ids).logits).all()
    start = Path(yaml.safe_load((finished_run / "config.yaml").read_text())["student"]["path"])
    before, after = load_file(start / "model.safetensors"), load_file(finished_run / "export" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_two_ranks_under_zero_3_sample_and_learn_what_one_rank_does(
    finished_run: Path, tmp_path: Path, demo_cache: Path, demo_teacher: tuple[str, ...]
) -> None:
    """The other stages: tests/training/student/test_ranks.py."""
    options = ("--steps", "3", "--actor.zero_stage", "3", "--sampling.prompts_at_once", "3")
    line = command(tmp_path, demo_cache, *demo_teacher, *options)
    finish_ranks(line, 2, tmp_path, 600, GRPO_KD_TEACHER_SECRET=SECRET)
    run = tmp_path / "grpo-minillm"

    def first_samples(path: Path) -> list[dict[str, object]]:
        return [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()][:4]

    assert [s["responses"] for s in first_samples(run)] == [s["responses"] for s in first_samples(finished_run)]
    for one, two in zip(timeless(metrics(finished_run)), timeless(metrics(run)), strict=True):
        assert one.keys() == two.keys()
        for key in one:
            assert two[key] == pytest.approx(one[key], abs=1e-3), key


def test_the_same_command_again_on_a_finished_run_says_so_quickly(finished_run: Path, demo_cache: Path) -> None:
    before = (finished_run / "metrics.jsonl").read_bytes()
    done = finish_forked(command(finished_run.parent, demo_cache, "--steps", "3", "--checkpoint.every", "2"))
    assert "student after" in done.stdout
    assert (finished_run / "metrics.jsonl").read_bytes() == before


def test_a_start_that_finds_a_summary_has_nothing_left_to_do(
    finished_run: Path, tmp_path: Path, demo_cache: Path
) -> None:
    """What a run gives back is there before summary.json; only the report reads that, and is made if it is missing."""
    summary = (finished_run / "summary.json").stat().st_mtime_ns  # may stand still for some milliseconds
    assert (finished_run / "export" / "README.md").stat().st_mtime_ns <= summary
    run = tmp_path / finished_run.name
    shutil.copytree(finished_run, run, ignore=shutil.ignore_patterns("checkpoints", "report.html", "eval"))
    done = finish_forked(command(tmp_path, demo_cache, "--steps", "3", "--checkpoint.every", "2"))
    assert "student after" in done.stdout
    assert (run / "report.html").is_file()


def test_steps_without_a_signal_are_no_failure(tmp_path: Path, train: Callable[..., Any]) -> None:
    """Every response is worth the same and such groups are left out: nothing is learnt, and every loss is finite."""
    (tmp_path / "alike.py").write_text("def alike(inputs):\n    return [0.0] * len(inputs.lengths_B)\n")
    options = ["--reward", "teacher_logprob", "--rewards.teacher_weight", "0", "--grpo.no_signal", "skip"]
    options += ["--rewards.custom", f"{tmp_path / 'alike.py'}:alike", "--actor.max_skipped", "1", "--steps", "2"]
    train(tmp_path, *options, "--eval.questions", "2")
    rows = metrics(tmp_path / "grpo-teacher_logprob")
    assert [(row["groups/without_signal"], row["skipped"]) for row in rows] == [(8, 0), (8, 0)]


def test_other_settings_under_the_same_name_are_refused(finished_run: Path, demo_cache: Path) -> None:
    other = ("--steps", "3", "--actor.learning_rate", "0.5")
    done = finish_forked(command(finished_run.parent, demo_cache, *other), code=2)
    assert "actor.learning_rate" in done.stderr
    assert "choose another --name" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_export_is_scored_as_the_trainer_did(finished_run: Path) -> None:
    done = finish_forked([PYTHON, str(ROOT / "eval" / "heldout.py"), "--runs_dir", str(finished_run.parent)])
    assert "f1" in done.stdout
    ours = read_result(finished_run / "eval" / "after.json")
    judged = read_result(finished_run / "eval" / "heldout.json")
    assert [row["prediction"] for row in judged.rows] == [a["prediction"] for a in ours.rows]
    assert any(a["prediction"] for a in ours.rows), "something was answered"
    for name in ("f1", "exact_match"):
        assert judged.values[name].value == pytest.approx(ours.values[name].value)


def test_stage_1_with_the_teachers_answers_asks_no_question_twice(tmp_path: Path, demo_cache: Path) -> None:
    start = [PYTHON, str(ROOT / "training" / "sft.py"), "--demo_size", "tiny"]
    rest = ["--runs_dir", str(tmp_path), "--cache_dir", str(demo_cache), "--sft.samples", "2", "--sft.steps", "5"]
    rest += ["--threads", "1", "--eval.questions", "24"]
    finish_forked([*start, *rest])
    files = {file: json.loads(file.read_text()) for file in demo_cache.glob("teacher-answers-*.json")}  # others' too
    ((kept, known),) = ((f, rows) for f, rows in files.items() if {len(answers) for answers in rows.values()} == {2})
    written = kept.stat().st_mtime_ns
    assert len(known) > 1000
    scores = json.loads((tmp_path / "sft" / "summary.json").read_text())["eval_after"]
    assert set(scores) == {"f1", "exact_match", "reverse_kl", "open_right", "open_different", "open_kl"}
    assert scores["reverse_kl"] > 0
    # A second time the file is read, and not written again.
    finish_forked([*start, *rest, "--name", "again"])
    assert kept.stat().st_mtime_ns == written
    assert (tmp_path / "again" / "export" / "model.safetensors").is_file()
