"""The plans that are shipped: every variant is a valid run, and they differ in what they compare."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.checks import validate
from configs.models import DEMO_STAGE1
from configs.schema import RunConfig, as_dict, flat
from eval.experiments.openings import main as make_openings
from eval.experiments.openings import split
from eval.experiments.plan import Plan, filled, read_plan
from tests.support.runs import ROOT
from training.run.cli import demo_config, parse

ABLATION = read_plan(ROOT / "configs" / "ablation.yaml")
MINIATURE = read_plan(ROOT / "configs" / "miniature.yaml")
GIVEN = {"models": "DIR", "text": "sentences.jsonl", "runs": "runs/x"}


def configs_of(plan: Plan) -> dict[str, RunConfig]:
    """The variants as the programs read them."""
    return {one.name: parse(plan.arguments(one, GIVEN), "test", demo_config) for one in plan.variants}


RUNS = {name: config for name, config in configs_of(ABLATION).items() if name != ABLATION.whole}
"""The variants of training/main.py; the whole is more of stage 1."""


@pytest.mark.parametrize("name", RUNS)
def test_every_variant_is_a_valid_run_on_the_same_questions(name: str) -> None:
    config, grpo = RUNS[name], RUNS["grpo-minillm"]
    validate(config)
    assert config.prompts_per_step * config.sampling.group_size == grpo.prompts_per_step * grpo.sampling.group_size
    assert config.sampling.max_new_tokens == grpo.sampling.max_new_tokens
    assert (config.data, config.eval) == (grpo.data, grpo.eval)
    assert config.actor.learning_rate == grpo.actor.learning_rate or config.reward == "teacher_logprob"


def test_the_approaches_and_the_baselines_are_there() -> None:
    by_group: dict[str, list[RunConfig]] = {}
    for variant in ABLATION.variants:
        if variant.name in RUNS:
            by_group.setdefault(variant.group, []).append(RUNS[variant.name])
    assert len({(config.algo, config.reward) for config in by_group["approaches"]}) == 4
    assert {config.recipe for config in by_group["baselines"]} == {"seqkd", "sampled_ce", "gkd", "bond", "warp"}
    assert len(ABLATION.seeds) == 5
    runs = len(ABLATION.seeds) * len(ABLATION.variants)
    assert f"--array=0-{runs - 1} " in (ROOT / "slurm" / "run_ablation.sh").read_text()


def test_more_of_stage_1_goes_on_from_where_stage_2_starts() -> None:
    (more,) = (one for one in ABLATION.variants if one.program == "training/sft.py")
    assert ABLATION.whole == more.name
    config = parse(ABLATION.arguments(more, GIVEN), "test", lambda _: ROOT / "configs" / "demo" / "sft.yaml")
    validate(config)
    assert config.student.path == DEMO_STAGE1
    assert (config.sft.answers, config.distill.answer_temperature) == ("teacher", 1.0)
    assert config.data == RUNS["grpo-minillm"].data


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("no-pt", {"loss.pt_coef": 0}), ("no-single-step", {"loss.single_step_coef": 0}),
        ("with-bc", {"loss.bc_coef": 0.05}), ("with-mixing", {"sampling.teacher_mix": 0.2}),
        ("with-kl", {"loss.kl_coef": 0.02}), ("top-16", {"loss.single_step_entries": 16}),
    ],
)  # fmt: skip
def test_each_part_is_changed_alone(name: str, keys: dict[str, float]) -> None:
    whole, other = (flat(as_dict(RUNS[one])) for one in ("grpo-minillm", name))
    assert {key: other[key] for key in whole if whole[key] != other[key]} == keys


def test_the_miniatures_variants_share_what_is_compared() -> None:
    found = configs_of(MINIATURE)
    for config in found.values():
        validate(config)
        assert config.data.template == "{question}"  # a prompt is the opening itself
        assert config.teacher.path == "runs/x/teacher/export"
        assert config.data == found["grpo-minillm"].data
    grpo, more, answers = (found[name] for name in ("grpo-minillm", "text-more", "teacher-answers"))
    assert (grpo.algo, grpo.reward, grpo.recipe) == ("grpo", "minillm", "rl")
    assert {config.student.path for config in (grpo, more, answers)} == {"runs/x/start/export"}
    for name, first in (("answers-more", answers), ("answers-then-grpo", grpo)):
        then = found[name]
        assert then.student.path == "runs/x/teacher-answers-seed0/export"
        assert replace(then, student=first.student) == first
    assert more.sft.learning_rate == answers.sft.learning_rate == grpo.actor.learning_rate
    # Where many continuations are right, the teacher's likeliest one says less than samples do.
    assert (answers.sft.answers, answers.distill.answer_temperature) == ("teacher", 1.0)


def test_a_plans_steps_are_those_of_each_program() -> None:
    by_name = {one.name: one for one in MINIATURE.variants}
    assert [MINIATURE.steps(by_name[name], None) for name in ("text-more", "grpo-minillm")] == [32, 16]
    assert MINIATURE.arguments(by_name["text-more"], GIVEN, 3)[-2:] == ["--sft.batch", "8"]
    assert "--sft.steps 3" in " ".join(MINIATURE.arguments(by_name["text-more"], GIVEN, 3))


def test_names_in_a_plan_are_filled_in_or_asked_for() -> None:
    given = {"data.text": None, "runs": "R", "data.prompts": "p.jsonl"}
    assert filled(["--words", "${data.prompts}", "${data.text}", "fo=${runs}/x"], given) == [
        "--words",
        "p.jsonl",
        "fo=R/x",
    ]
    with pytest.raises(ValueError, match=r"\$\{models\}: give --with models=VALUE"):
        filled(["${models}/gemma"], given)


def test_bad_plans_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    for text in ("variants: 3", "[", "seeds: [0]"):
        path.write_text(text)
        with pytest.raises(ValueError, match="not the plan of an experiment"):
            read_plan(path)
    one: dict[str, Any] = {"name": "a", "what": "w", "settings": {}}
    for values, message in (
        ({"variants": [one, one]}, "same name"),
        ({"variants": [one | {"group": "g"}]}, "no heading for the groups g"),
        ({"variants": [one], "whole": "b"}, "whole = 'b'"),
        ({"variants": [one], "seeds": 3}, "not the plan of an experiment"),
        ({"variants": [one], "seeds": "012"}, "not the plan of an experiment"),
        ({"variants": [one], "seeds": []}, "seeds is empty"),
    ):
        path.write_text(yaml.safe_dump({"seeds": [0], "columns": {}, **values}))
        with pytest.raises(ValueError, match=message):
            read_plan(path)
    path.write_text(
        "seeds: [0]\ncolumns: {}\nvariants:\n- {name: a, what: w, settings: }\ncommon:\nmeasures:\ngroups:\n"
    )
    plan = read_plan(path)
    assert plan.arguments(plan.variants[0], {}) == []
    assert (plan.measures, plan.groups) == ({}, {"": "Variants"})
    path.write_text(path.read_text() + "common: {steps: 3}\n")
    with pytest.raises(ValueError, match="line 8: key 'common' is there twice"):
        read_plan(path)
    with pytest.raises(ValueError, match="no such variant; there are text-more, teacher-answers, "):
        MINIATURE.chosen(["text-more", "other"])


def test_held_out_sentences_are_in_no_file_of_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sentences = [f"Hetta er setningur nummar {i} av mongum." for i in range(150)]
    text = tmp_path / "sentences.jsonl"
    text.write_text("".join(json.dumps({"text": s}) + "\n" for s in [*sentences, "  ".join(sentences[0].split())]))
    assert make_openings([str(text), str(tmp_path / "data")]) == 0

    def rows(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / "data" / f"{name}.jsonl").read_text().splitlines()]

    train, heldout = ([row["text"] for row in rows(name)] for name in ("text", "heldout"))
    assert sorted([*train, *heldout]) == sorted(sentences)
    assert len(heldout) == 100
    assert [f"{row['question']} {row['answers'][0]}" for row in rows("prompts")] == train
    assert [row["question"] for row in rows("questions")] == [" ".join(s.split()[:3]) for s in heldout]
    assert split(sentences, 10, 0) != split(sentences, 10, 1)
    assert make_openings([str(text), str(tmp_path), "--heldout", "150"]) == 2
    assert "--heldout 150: the text has 150 sentences" in capsys.readouterr().err
