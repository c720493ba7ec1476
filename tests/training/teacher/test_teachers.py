"""Several teachers: their sum by hand, what is refused, and a run with two servers and two tokenizers."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.checks import validate
from configs.schema import ExtraTeacherConfig, RunConfig, TeacherConfig, as_dict
from rewards.base import RewardOutput
from rewards.combine import TeacherReward, weighted_sum
from tests.support.forked import finish_forked
from tests.support.runs import command, metrics
from tests.support.tiny_tokenizers import save_tiny
from training.run.choices import check_choices
from training.run.cli import dump_config, load_config


def test_rewards_and_returns_are_added_by_weight() -> None:
    first = RewardOutput(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0]), {"minillm": torch.tensor([3.0])})
    second = RewardOutput(torch.tensor([-4.0, 0.0]), torch.tensor([-4.0, 1.0]), {"minillm": torch.tensor([-4.0])})
    out = weighted_sum([TeacherReward(None, 0.5, first), TeacherReward("stor", 0.25, second)])
    assert out.rewards_S.tolist() == [-0.5, 1.0]
    assert out.returns_S is not None
    assert out.returns_S.tolist() == [0.5, 1.25]
    assert {name: values.tolist() for name, values in out.parts_B.items()} == {"minillm": [3.0], "minillm/stor": [-4.0]}
    alone = weighted_sum([TeacherReward(None, 1.0, dataclasses.replace(first, returns_S=None))])
    assert alone.rewards_S.tolist() == [1.0, 2.0]
    assert alone.returns_S is None
    some = [TeacherReward(None, 1.0, first), TeacherReward("b", 1.0, dataclasses.replace(second, returns_S=None))]
    assert weighted_sum(some).returns_S is None


@pytest.mark.parametrize(
    ("teachers", "recipe", "message"),
    [
        (("a", "a"), "rl", r"teachers\[1\].name = 'a': give each its own name"),
        (("a/b",), "rl", r"teachers\[0\].name = 'a/b'"),
        (("a",), "gkd", r"teachers = \['a'\]: recipe gkd has no reward"),
    ],
)
def test_bad_values_name_key_value_and_mend(teachers: tuple[str, ...], recipe: str, message: str) -> None:
    extra = tuple(ExtraTeacherConfig(name=name) for name in teachers)
    check = validate if recipe == "rl" else check_choices
    with pytest.raises(ValueError, match=message):
        check(RunConfig(teachers=extra, recipe=recipe))
    bad = ExtraTeacherConfig(name="a", tensor_parallel=0, weight=float("nan"))
    with pytest.raises(ValueError, match=r"teachers\[0\].tensor_parallel = 0: must be at least 1"):
        validate(RunConfig(teachers=(bad,)))
    with pytest.raises(ValueError, match=r"teachers\[0\].weight = nan"):
        validate(RunConfig(teachers=(dataclasses.replace(bad, tensor_parallel=1),)))
    forgotten = RunConfig(teacher=TeacherConfig(path="mine"), teachers=(ExtraTeacherConfig(name="a"),))
    with pytest.raises(ValueError, match=r"teachers\[0\].path = 'demo': name its model"):
        validate(forgotten)


def test_they_are_written_and_read_back(tmp_path: Path) -> None:
    config = RunConfig(teachers=(ExtraTeacherConfig(name="a", path="x"), ExtraTeacherConfig(name="b", weight=-0.5)))
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(as_dict(config)))
    assert load_config(file) == config


def test_a_wrong_directory_is_named(tmp_path: Path, demo_cache: Path) -> None:
    file = write_config(tmp_path / "config.yaml", tmp_path / "nowhere")
    done = finish_forked(command(tmp_path, demo_cache, "--config", str(file)), code=2)
    assert "teachers[0].path" in done.stderr


def write_config(file: Path, other: Path) -> Path:
    values = {
        "algo": "grpo",
        "reward": "teacher_logprob",
        "steps": 1,
        "rewards": {"teacher_weight": 0.5, "length_alpha": 0.0},
        "sampling": {"max_new_tokens": 12},
        "teacher": {"tensor_parallel": 1},
        "teachers": [{"name": "other", "path": str(other), "tensor_parallel": 1, "weight": 2.0}],
    }
    file.write_text(yaml.safe_dump(values))
    return file


def test_a_run_adds_the_rewards_of_two_servers(tmp_path: Path, demo_cache: Path) -> None:
    """The second has a tokenizer of its own; its part is the log-probability that transformers gives the text."""
    other = save_tiny(tmp_path / "other", "byte_level")
    file = write_config(tmp_path / "config.yaml", other)
    finish_forked(command(tmp_path, demo_cache, "--config", str(file), "--eval.questions", "4", "--name", "run"))
    (row,) = metrics(tmp_path / "run")
    parts = [row["reward/teacher_logprob"], row["reward/teacher_logprob/other"]]
    assert row["reward/mean"] == pytest.approx(0.5 * parts[0] + 2.0 * parts[1], rel=1e-5)
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(other).eval(), AutoTokenizer.from_pretrained(other)
    rewards = sample["rewards"]["teacher_logprob/other"]
    right = 0
    for text, reward in zip(sample["responses"], rewards, strict=True):
        # The log has the text stripped, the teacher reads it as it was written, with its end symbol where it ended.
        totals = [
            total_logprob(model, tokenizer, sample["prompt"], lead + text + tail, ended)
            for lead, tail, ended in itertools.product(("", " "), ("", " "), (True, False))
        ]
        right += any(reward == pytest.approx(total, abs=1e-3) for total in totals)
    assert right >= len(rewards) - 2  # a response may hold what the log does not show: a character that was cut off


@torch.no_grad()
def total_logprob(model: torch.nn.Module, tokenizer: object, prompt: str, text: str, ended: bool) -> float:
    first = tokenizer(prompt)["input_ids"]  # type: ignore[operator]
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[operator]
    tokens = [*tokens, tokenizer.eos_token_id] if ended else tokens  # type: ignore[attr-defined]
    if not tokens:
        return 0.0
    logprobs = model(torch.tensor([[*first, *tokens]])).logits[0, len(first) - 1 : -1].log_softmax(-1)
    return float(logprobs.gather(-1, torch.tensor(tokens)[:, None]).sum())
