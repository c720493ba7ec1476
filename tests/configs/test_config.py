"""Every YAML in configs/ loads, passes its checks and describes the pair that its name promises."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from configs.checks import validate
from configs.schema import (
    ActorConfig,
    DistillConfig,
    ExtraTeacherConfig,
    LossConfig,
    RunConfig,
    SamplingConfig,
    SFTConfig,
    as_dict,
)
from training.main import main
from training.objective import pt_coef, single_step_coef
from training.run.choices import check_vocabularies, without_effect
from training.run.cli import COMMON, DEMO_CONFIGS, dump_config, instantiate, load_config, make_parser

ROOT = Path(__file__).resolve().parents[2]
PLANS = ("frames.yaml", "ablation.yaml", "crossing.yaml", "miniature.yaml", "sentiment.yaml")
RUNS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if p.name not in PLANS)


@pytest.mark.parametrize("path", RUNS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_configuration_loads_and_is_valid(path: Path) -> None:
    config = load_config(path)
    validate(config)
    assert path.name == "sft.yaml" or not without_effect(config, same_tokenizer=True)
    again = instantiate(make_parser("again"), ["--config", str(path)])
    assert config == again


@pytest.mark.parametrize(
    ("name", "teacher", "student", "parallel"),
    [
        ("gemma3_27b_mistral_7b", "gemma-3-27b", "Mistral-7B", 2),
        ("llama2_70b_llama2_7b", "Llama-2-70b", "Llama-2-7b", 4),
        ("gemma3_27b_gptsw3_6_7b", "gemma-3-27b", "gpt-sw3-6.7b", 2),
        ("gemma3_270m_smollm2_135m", "gemma-3-270m", "smollm2-135m", 2),
    ],
)
def test_the_real_pairs(name: str, teacher: str, student: str, parallel: int) -> None:
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    assert teacher in config.teacher.path
    assert student in config.student.path
    assert config.teacher.tensor_parallel == parallel


@pytest.mark.parametrize("algo", ["grpo", "ppo"])
@pytest.mark.parametrize("reward", ["teacher_logprob", "minillm"])
def test_the_demo_has_a_file_for_each_approach(algo: str, reward: str) -> None:
    config = load_config(DEMO_CONFIGS / f"{algo}_{reward}.yaml")
    assert (config.algo, config.reward) == (algo, reward)
    assert config.run_name == f"{algo}-{reward}"
    assert replace(config, seed=3).run_name == f"{algo}-{reward}-seed3"


def test_a_written_configuration_reads_back(tmp_path: Path) -> None:
    config = load_config(DEMO_CONFIGS / "ppo_minillm.yaml")
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(as_dict(config)))
    assert load_config(path) == config


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("steps: 7\nsampling:\n  group_size: 5\n")
    config = instantiate(make_parser("x"), ["--config", str(path), "--steps", "9"])
    assert (config.steps, config.sampling.group_size, config.sampling.max_new_tokens) == (
        9,
        5,
        SamplingConfig().max_new_tokens,
    )


def test_lambda_pt_and_lambda_1_follow_the_reward() -> None:
    config = RunConfig(reward="minillm")
    assert (pt_coef(config), pt_coef(RunConfig(reward="teacher_logprob"))) == (0.1, 0.0)
    assert single_step_coef(config, same_tokenizer=True) == 1.0
    assert single_step_coef(config, same_tokenizer=False) == 0.0
    assert single_step_coef(RunConfig(reward="teacher_logprob"), same_tokenizer=True) == 0.0
    asked = replace(config, loss=replace(config.loss, single_step_coef=0.5))
    assert single_step_coef(asked, same_tokenizer=True) == 0.5
    with pytest.raises(ValueError, match=r"loss.single_step_coef = 0.5: .* different tokenizers"):
        check_vocabularies(asked, same_tokenizer=False, columns=100)


def test_help_explains_every_field() -> None:
    text = " ".join(make_parser("x").format_help().split())
    for phrase in (
        "--actor.learning_rate",
        "Peak learning rate of AdamW",
        "Longest response, in tokens",
        "default: 1.0",
    ):
        assert phrase in text


@pytest.mark.parametrize("everything", [False, True])
def test_help_is_what_people_change_and_help_all_is_everything(
    everything: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--steps", "3", "--help", *(["all"] if everything else [])])
    page = capsys.readouterr().out
    assert ended.value.code == 0
    shown = set(re.findall(r"^  --([\w.]+)", page, re.MULTILINE))
    every = {action.dest for action in make_parser("x")._actions if action.dest != "help"}
    assert every >= COMMON
    assert shown == (every if everything else COMMON)
    assert 20 <= len(COMMON) <= 30
    assert "--doctor: " in " ".join(page.split()), "what takes the place of a run is said on both"
    assert everything or len(page.splitlines()) < 130


def test_the_printed_configuration_has_comments_and_is_the_default_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        main(["--print_config"])
    page = capsys.readouterr().out
    assert "\n# Steps of stage 2. Stages 0 and 1 take sft.steps. (type: int, default: 100)\nsteps: 100\n" in page
    (tmp_path / "my.yaml").write_text(page)
    assert load_config(tmp_path / "my.yaml") == RunConfig()
    with pytest.raises(SystemExit):
        main(["--config", str(DEMO_CONFIGS / "grpo_minillm.yaml"), "--steps", "7", "--print_config"])
    (tmp_path / "my.yaml").write_text(capsys.readouterr().out)
    assert load_config(tmp_path / "my.yaml") == replace(load_config(DEMO_CONFIGS / "grpo_minillm.yaml"), steps=7)


def test_no_file_hides_a_standard_module() -> None:
    """A script's folder comes first on sys.path until the script puts the root there."""
    import sys

    for room in ("training", "inference", "eval", "rewards", "configs"):
        for path in (ROOT / room).glob("*.py"):
            assert path.stem == "__init__" or path.stem not in sys.stdlib_module_names, path


def test_the_demo_is_built_only_for_what_is_read() -> None:
    from training.data.demo.resolve import demo_parts

    mine = RunConfig(
        student=replace(RunConfig().student, path="/s"),
        teacher=replace(RunConfig().teacher, path="/t"),
        data=replace(RunConfig().data, prompts="p", heldout="h", text="t"),
    )
    assert not demo_parts(mine, stage=2)  # data.warmup is still `demo`, but stage 2 without L_BC does not read it
    assert demo_parts(replace(mine, loss=replace(mine.loss, bc_coef=0.1)), stage=2) == ["data.warmup"]
    assert demo_parts(mine, stage=1) == ["data.warmup"]
    no_text = replace(mine, reward="teacher_logprob", data=replace(mine.data, text="demo"))
    assert not demo_parts(no_text, stage=2)
    assert demo_parts(replace(no_text, reward="minillm"), stage=2) == ["data.text"]
    assert demo_parts(RunConfig(), stage=0) == ["student.path", "data.text"]


def test_a_run_that_is_older_than_a_setting_goes_on_where_the_setting_has_its_default(tmp_path: Path) -> None:
    from training.run.resuming import check_settings
    from training.run.run_folder import RunFolder

    folder = RunFolder(tmp_path / "run")
    (folder.checkpoints / "step-000010").mkdir(parents=True)
    settings = as_dict(RunConfig())
    assert isinstance(settings["eval"], dict)
    del settings["eval"]["patience"]
    (folder.path / "config.yaml").write_text(dump_config(settings))
    check_settings(folder, RunConfig())
    with pytest.raises(ValueError, match=r"eval\.patience: .* then, 7 now"):
        check_settings(folder, replace(RunConfig(), eval=replace(RunConfig().eval, patience=7)))
    second = ExtraTeacherConfig(name="second", path="models/second")
    settings["teachers"] = [{k: v for k, v in asdict(second).items() if k != "served_name"}]
    (folder.path / "config.yaml").write_text(dump_config(settings))
    check_settings(folder, replace(RunConfig(), teachers=(second,)))
    with pytest.raises(ValueError, match=r"teachers\[0\]\.served_name: None then, 'a' now"):
        check_settings(folder, replace(RunConfig(), teachers=(replace(second, served_name="a"),)))
    moved = replace(RunConfig().teacher, url="http://b:8000/v1", devices="2")
    settings = as_dict(replace(RunConfig(), teacher=replace(moved, url="http://a:8000/v1", devices=None)))
    (folder.path / "config.yaml").write_text(dump_config(settings))
    check_settings(folder, replace(RunConfig(), teacher=moved))  # served elsewhere since


@pytest.mark.parametrize(
    ("key", "value", "mend"),
    [
        ("steps", 0, "at least 1"),
        ("actor.updates_per_rollout", 0, "at least 1"),  # not a division by it
        ("actor.learning_rate", float("nan"), "above 0"),
        ("loss.single_step_schedule.steps", 0, "at least 1"),
        ("loss.pt_coef", -0.1, "at least 0"),
        ("rewards.judge.attempts", 0, "at least 1"),
        ("sampling.teacher_mix", 1.0, "at least 0 and below 1"),
        ("distill.jsd_beta", 1.5, "between 0 and 1"),
    ],
)
def test_a_number_out_of_its_range_is_named_wherever_it_stands(key: str, value: float, mend: str) -> None:
    def changed(config: Any, names: list[str]) -> Any:
        inner = changed(getattr(config, names[0]), names[1:]) if names[1:] else value
        return replace(config, **{names[0]: inner})

    with pytest.raises(ValueError, match=rf"^{re.escape(key)} = {value!r}: must .*{mend}"):
        validate(changed(RunConfig(), key.split(".")))


def test_greedy_answers_to_a_prompt_are_asked_for_once() -> None:
    def check(answers: Literal["data", "teacher"], temperature: float) -> None:
        sft, distill = SFTConfig(answers=answers, samples=4), DistillConfig(answer_temperature=temperature)
        validate(replace(RunConfig(), sft=sft, distill=distill))

    check("teacher", 1.0)
    check("data", 0.0)
    with pytest.raises(ValueError, match=r"^sft.samples = 4: .* set distill.answer_temperature"):
        check("teacher", 0.0)


def test_a_choice_that_there_is_not_is_named_with_those_that_there_are() -> None:
    """In a notebook too, where no parser has looked: k1 has no gradient in expectation."""
    with pytest.raises(ValueError, match=r"^loss.kl_estimator = 'k1': use k2, k3, full$"):
        validate(RunConfig(loss=LossConfig(kl_estimator="k1")))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^actor.zero_stage = 4: use 0, 1, 2, 3$"):
        validate(RunConfig(actor=ActorConfig(zero_stage=4)))  # type: ignore[arg-type]


def test_the_demos_settings_are_for_the_demos_models() -> None:
    """Its learning rate would ruin any other model that comes without a file of its own."""
    from training.run.cli import demo_config, parse, parse_supervised

    def rate(*flags: str) -> float:
        return parse(flags, "test", demo_config).actor.learning_rate

    assert (
        rate()
        == rate("--student.path", "runs/warm/export")
        == load_config(DEMO_CONFIGS / "grpo_minillm.yaml").actor.learning_rate
    )
    assert rate("--student.path", "own/7b", "--teacher.path", "own/70b") == RunConfig().actor.learning_rate
    assert rate("--student.path", "own/7b", "--data.warmup", "own.jsonl") == RunConfig().actor.learning_rate

    def supervised(*flags: str) -> float:
        return parse_supervised(flags, "test", "warm").sft.learning_rate

    assert supervised() == load_config(DEMO_CONFIGS / "sft.yaml").sft.learning_rate
    assert supervised("--student.path", "own/7b", "--data.warmup", "own.jsonl") == RunConfig().sft.learning_rate
