"""What the README promises: its commands run, its examples are read as they stand."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

from configs.jsonl import read_questions
from configs.schema import validate
from tests.runs import ROOT, TINY, environment, finish
from training.cli import instantiate, load_config, make_parser

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Fenced blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    """Every command line of the README: in bash blocks, and in backticks at the start of a table row."""
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    for cell in re.findall(r"^\| (`.*?) \|", README, re.MULTILINE):
        lines += re.findall(r"`((?:bash|deepspeed|python|sbatch|make) [^`]*)`", cell)
    return sorted({line for line in lines if line})


def test_every_command_names_a_file_and_settings_that_exist() -> None:
    assert len(commands()) >= 12
    for line in commands():
        words = shlex.split(line)
        if words[0] == "make":
            target = words[1].rstrip(",")
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
            continue
        script = next(word for word in words if word.endswith((".sh", ".py")))
        assert (ROOT / script).is_file(), line
        settings = [word for word in words[words.index(script) + 1 :] if word not in ("--plan", "--doctor")]
        if (
            script.endswith(("main.py", "run_stage2_grpo.sh"))
            and "--help" not in settings
            and not {"my.yaml", "FILE"} & set(settings)
        ):
            instantiate(make_parser("readme"), settings)


def test_the_yaml_example_is_a_valid_configuration(tmp_path: Path) -> None:
    (example,) = blocks("yaml")
    path = tmp_path / "my.yaml"
    path.write_text(example)
    config = load_config(path)
    validate(config)
    assert config.teacher.tensor_parallel == 2


def test_the_jsonl_example_is_read(tmp_path: Path) -> None:
    (example,) = blocks("json")
    path = tmp_path / "mine.jsonl"
    path.write_text(example)
    rows = read_questions(path)
    assert [row["answers"] for row in rows] == [["Tórshavn"], ["1920", "í 1920"]]


@pytest.mark.parametrize(
    ("command", "run"),
    [
        (["bash", "slurm/run_stage2_grpo.sh"], "grpo-minillm"),
        (["bash", "slurm/run_stage2_ppo.sh", "--reward", "teacher_logprob"], "ppo-teacher_logprob"),
        (["deepspeed", "training/main.py", "--algo", "ppo", "--reward", "minillm"], "ppo-minillm"),
    ],
)
def test_stage_2_from_the_command_line(command: list[str], run: str, tmp_path: Path, demo_cache: Path) -> None:
    done = finish([*command, *TINY, "--steps", "2", "--runs_dir", str(tmp_path), "--cache_dir", str(demo_cache)])
    assert json.loads((tmp_path / run / "summary.json").read_text())["status"] == "finished"
    assert "student after" in done.stdout
    assert (tmp_path / run / "report.html").is_file()


@pytest.mark.timeout(1800)
def test_stages_1_and_3_from_the_command_line(tmp_path: Path, demo_cache: Path) -> None:
    where = ["--runs_dir", str(tmp_path)]
    tiny = ["--demo_size", "tiny", "--cache_dir", str(demo_cache), "--threads", "1", "--sft.steps", "3"]
    done = finish(["bash", "slurm/run_stage1_sft.sh", *tiny, *where])
    assert "stage 1: held-out F1" in done.stdout
    judged = importlib.util.find_spec("euroeval") is not None
    quick = ["--tasks", "fosent", "--iterations", "1", "--cache_dir", str(tmp_path / "cache")]
    done = finish(["bash", "slurm/run_stage3_eval.sh", *quick, *where], code=0 if judged else 2, timeout=1200)
    assert "F1" in done.stdout
    assert "macro_f1" in done.stdout if judged else "EuroEval is not installed; pip install" in done.stderr
    assert (tmp_path / "sft" / "eval" / "heldout.json").is_file()


def test_help_is_there_without_a_launcher() -> None:
    done = finish([environment()["PATH"].split(":")[0] + "/python", "training/main.py", "--help"])
    assert "--sampling.group_size" in done.stdout
    assert "Responses to each prompt" in " ".join(done.stdout.split()) or "responses to each prompt" in done.stdout
