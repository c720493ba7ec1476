"""Every recipe and every switch around the loop, as a real run on the tiny demo."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from configs.schema import ActorConfig, LossConfig, PhaseConfig, RunConfig, SamplingConfig, ScheduleConfig
from inference.attention.packing import Group
from tests.support.runs import metrics, timeless
from training.collect import Step
from training.loop import _supervised_phase
from training.objective import SUPERVISED, LossWeights
from training.recipes import RECIPES
from training.run.choices import check_vocabularies
from training.run.cli import DEMO_CONFIGS, load_config

PT = load_config(DEMO_CONFIGS / "grpo_minillm.yaml").loss.pt_coef or 0.0
"""What the demo weighs L_PT by."""
FEW = ["--eval.questions", "8", "--name", "run"]
Run = Callable[..., Path]


@pytest.fixture
def run(train: Callable[..., object]) -> Run:
    """Starts a run in a folder with options, and gives its own folder."""

    def start(folder_of_runs: Path, *options: str) -> Path:
        train(folder_of_runs, *FEW, *options)
        return folder_of_runs / "run"

    return start


def weights(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


def start_of(folder: Path) -> dict[str, torch.Tensor]:
    return weights(Path(yaml.safe_load((folder / "config.yaml").read_text())["student"]["path"]))


def test_seqkd_learns_from_the_teachers_answers_alone(tmp_path: Path, run: Run) -> None:
    rows = metrics(run(tmp_path, "--recipe", "seqkd", "--steps", "4", "--actor.learning_rate", "0.003"))
    assert rows[-1]["loss/bc"] < rows[0]["loss/bc"]
    assert not any("loss/policy" in row or "loss/single_step" in row for row in rows)
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert all(len(s["responses"]) == 1 for s in samples)


def test_sampled_cross_entropy_falls_on_the_teachers_answers(tmp_path: Path, run: Run) -> None:
    options = ["--recipe", "sampled_ce", "--steps", "4", "--actor.learning_rate", "0.003", "--distill.sampled_tokens"]
    rows = metrics(run(tmp_path, *options, "64"))
    assert rows[-1]["loss/single_step"] < rows[0]["loss/single_step"]
    assert rows[-1]["loss/total"] == pytest.approx(
        rows[-1]["loss/single_step"] + PT * rows[-1]["loss/pt"], rel=1e-4
    )  # no policy gradient


def test_gkd_is_a_divergence_on_the_students_own_answers(tmp_path: Path, run: Run) -> None:
    options = ["--recipe", "gkd", "--steps", "4", "--actor.learning_rate", "0.003", "--distill.jsd_beta", "1.0"]
    rows = metrics(run(tmp_path, *options))
    # beta 1 is the reverse KL, whose estimate from the same samples is kl/teacher.
    assert rows[0]["loss/single_step"] == pytest.approx(rows[0]["kl/teacher"], rel=0.5)
    assert rows[-1]["loss/single_step"] < rows[0]["loss/single_step"]
    assert rows[-1]["loss/total"] == pytest.approx(rows[-1]["loss/single_step"] + PT * rows[-1]["loss/pt"], rel=1e-4)


def test_bond_imitates_the_best_and_climbs_the_quantile(tmp_path: Path, run: Run) -> None:
    options = ["--recipe", "bond", "--reward", "teacher_logprob", "--steps", "2", "--loss.kl_coef", "0.1"]
    rows = metrics(run(tmp_path, *options, "--reference.update", "ema"))
    assert {"loss/policy", "loss/bc", "loss/kl"} <= rows[-1].keys()
    last = rows[-1]
    expected = 0.5 * last["loss/policy"] + 0.5 * last["loss/bc"] + 0.1 * last["loss/kl"]
    assert last["loss/total"] == pytest.approx(expected, rel=1e-4)


def test_warp_exports_a_student_half_way_from_the_start(tmp_path: Path, run: Run) -> None:
    options = ["--steps", "2", "--reference.update", "ema", "--loss.kl_coef", "0.1"]
    merged = run(tmp_path / "warp", "--recipe", "warp", *options)
    whole = run(tmp_path / "rl", *options)
    start, end = start_of(merged), weights(whole / "export")
    for name, value in weights(merged / "export").items():
        torch.testing.assert_close(value, 0.5 * (start[name] + end[name]), atol=1e-6, rtol=0)


def test_everything_around_the_loop_at_once(tmp_path: Path, run: Run) -> None:
    options = ["--steps", "4", "--sampling.teacher_mix", "0.3", "--reference.update", "ema", "--loss.kl_coef", "0.1",
               "--loss.kl_estimator", "full", "--loss.pt_schedule.kind", "linear", "--loss.pt_schedule.steps", "3",
               "--loss.gradient_shares_every", "2",
               "--phases.every", "2", "--phases.steps", "2", "--loss.importance_cap", "2",
               "--reference.kl_limit", "100"]  # fmt: skip
    folder = run(tmp_path, *options, "--checkpoint.every", "1")
    unbroken = metrics(folder)
    rows = unbroken[:3]
    assert rows[0]["kl/start"] == pytest.approx(0.0, abs=1e-9)
    assert rows[2]["kl/start"] > 0
    assert rows[1]["loss/kl"] > 0  # full KL to the reference
    assert [("gradient/policy_share" in row) for row in rows] == [True, False, True]
    shares = [v for k, v in rows[0].items() if k.startswith("gradient/") and k.endswith("_share")]
    assert sum(shares) == pytest.approx(1.0)
    assert [("loss/supervised_phase" in row) for row in rows] == [False, True, False]
    assert all(0.5 < row["importance/mean"] < 1.5 for row in rows)
    for step, row in enumerate(rows):  # lambda_PT falls to 0 over three steps
        terms = row["loss/policy"] + 0.1 * row["loss/kl"] + row["loss/single_step"]
        assert row["loss/total"] == pytest.approx(terms + PT * (1 - step / 3) * row["loss/pt"], rel=1e-4)
    # A moving reference is part of the checkpoint: from that of step 3 the run goes on as if it had not stopped.
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "step-000004")
    (folder / "checkpoints" / "latest").write_text("step-000003")
    run(tmp_path, *options, "--checkpoint.every", "1")
    assert timeless(metrics(folder)) == timeless(unbroken)
    assert metrics(folder)[3] != unbroken[3], "it was done again"


def test_a_supervised_phase_goes_on_at_the_learning_rate_of_the_update_before() -> None:
    """Optimizer steps count every mini-batch of a rollout, and so does the schedule."""
    asked = []

    class Counting:
        def update(self, batches: Any, step: int) -> dict[str, float]:
            asked.append(step)
            return {"loss/bc": 1.0}

    config = RunConfig(phases=PhaseConfig(every=2, steps=3), actor=ActorConfig(updates_per_rollout=4))
    corpus, models = SimpleNamespace(cloning=[Group((3,), ((4,),))]), SimpleNamespace(actor=Counting())
    run: Any = SimpleNamespace(config=config, corpus=corpus, models=models)
    assert _supervised_phase(run, Step(5, SUPERVISED)) == {"loss/supervised_phase": 1.0}
    assert asked == [23] * 3  # the sixth step's updates were 20 to 23


def test_responses_of_the_teacher_among_the_students_carry_their_weight(tmp_path: Path, run: Run) -> None:
    options = ["--reward", "teacher_logprob", "--steps", "2", "--sampling.teacher_mix", "0.5", "--sampling.mix_by",
               "response", "--grpo.baseline", "leave_one_out", "--grpo.no_signal", "resample"]  # fmt: skip
    rows = metrics(run(tmp_path, *options))
    assert all(0.3 < row["importance/mean"] <= 2.0 for row in rows)  # at most 1 / (1 - alpha)
    assert all("groups/without_signal" in row for row in rows)


def test_the_teachers_likeliest_entries_bound_the_single_step_term_from_below(
    finished_run: Path, tmp_path: Path, run: Run
) -> None:
    def first(entries: str) -> dict[str, float]:
        options = ["--steps", "1", "--loss.single_step_entries", entries]
        return metrics(run(tmp_path / entries, *options))[0]

    exact, most, few = metrics(finished_run)[0], first("64"), first("2")
    assert 0 < few["loss/single_step"] < most["loss/single_step"] < exact["loss/single_step"]
    assert few["kl/teacher"] == pytest.approx(exact["kl/teacher"], rel=1e-4)  # the same samples, the same scores


def test_a_student_too_far_from_its_start_is_stopped(tmp_path: Path, train: Callable[..., Any]) -> None:
    options = [*FEW, "--steps", "6", "--reference.kl_limit", "0.001", "--actor.learning_rate", "0.01"]
    train(tmp_path, *options)
    folder = tmp_path / "run"
    rows, summary = metrics(folder), json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert len(rows) < 6
    assert rows[-1]["kl/start"] > 0.001
    assert all(row["kl/start"] <= 0.001 for row in rows[:-1])
    again = train(tmp_path, *options)
    assert "finished already" in again.stdout
    assert metrics(folder) == rows


def test_a_recipe_or_a_mixture_that_needs_one_tokenizer_says_so_before_anything_is_built() -> None:
    for recipe in ("gkd", "sampled_ce"):
        with pytest.raises(ValueError, match=f"recipe = '{recipe}': .* use seqkd, bond, warp or rl"):
            check_vocabularies(RunConfig(recipe=recipe), False, 9)
        check_vocabularies(RunConfig(recipe=recipe), True, 9)
    mixed = RunConfig(sampling=SamplingConfig(teacher_mix=0.2))
    with pytest.raises(ValueError, match=r"sampling.teacher_mix = 0.2: .* set sampling.mix_by to response"):
        check_vocabularies(mixed, False, 9)


def test_the_course_of_a_weight_holds_for_the_recipes_own_terms() -> None:
    """seqkd's imitation and gkd's divergence are the loss without being asked for; they fall as any other term."""
    course = ScheduleConfig(kind="linear", final=0.0, steps=4)

    def at(recipe: str, **loss: Any) -> LossWeights:
        terms = LossConfig(pt_coef=0.0, bc_schedule=course, single_step_schedule=course, **loss)
        return RECIPES[recipe].weights(RunConfig(recipe=recipe, loss=terms), 1, same_tokenizer=True)

    assert at("seqkd") == LossWeights(bc=0.75)
    assert at("seqkd", bc_coef=2.0) == LossWeights(bc=1.5)
    assert at("gkd") == LossWeights(single_step=0.75)
    assert at("gkd", single_step_coef=2.0) == LossWeights(single_step=1.5)
