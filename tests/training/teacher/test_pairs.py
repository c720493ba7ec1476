"""Base students of instruct teachers, as people pair them: the student goes on ending its answers.

The demo's models in the guise of real pairs: the teacher's turn ends in another symbol than the student's text (rows of
the two are exchanged in the teacher's matrix, so it does end so), and it is asked in a chat template.
"""

from __future__ import annotations

from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.forked import finish_forked
from tests.support.runs import ROOT, command, metrics
from tests.support.teacher_servers import SECRET, served

TEMPLATES = {
    "qwen": "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}TURN\n{% endif %}{% endfor %}",
    "gemma": "{% for m in messages %}{{ m['content'] | trim }}"
    "{% if m['role'] == 'assistant' %}TURN{% endif %}{% endfor %}",
}
"""Behind the demo's plain prompt, so that its teacher understands; the turn ends as in ChatML, and as Gemma's does."""


def instruct(source: Path, target: Path, template: str) -> int:
    """The demo's teacher as an instruct model whose turn ends in its padding symbol; that symbol's id."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    end, turn = tokenizer.eos_token_id, tokenizer.pad_token_id
    tokenizer.chat_template = template.replace("TURN", tokenizer.pad_token)
    tokenizer.save_pretrained(target)
    for name in ("config.json", "generation_config.json"):
        if (source / name).is_file():
            (target / name).write_text((source / name).read_text())
    tensors = load_file(source / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name][[end, turn]] = tensors[name][[turn, end]].clone()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return int(turn)


def with_another_tokenizer(source: Path, target: Path) -> None:
    """The student with one more token, so that teacher and student share no tokenizer."""
    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModelForCausalLM.from_pretrained(source)
    tokenizer.add_tokens(["oyggjalag"])
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


UNEXCHANGED = """
import os, sys
sys.path.insert(0, {root!r})
from training.teacher.link import TeacherFacts
TeacherFacts.exchanged = property(lambda facts: {{}})
from training.main import main
os._exit(main(sys.argv[1:]))
"""


def test_without_the_exchange_the_share_falls(finished_run: Path, tmp_path: Path, demo_cache: Path) -> None:
    """What the test below would see if each model's end were taken for what it is to the other: a token like any."""
    line, _ = pair_of("qwen3-8b-base", "qwen", finished_run, tmp_path, demo_cache)
    script = tmp_path / "unexchanged.py"
    script.write_text(UNEXCHANGED.format(root=str(ROOT)))
    taught([line[0], str(script), *line[2:]], tmp_path)
    shares = [row["length/finished_share"] for row in metrics(tmp_path / "runs" / "grpo-minillm")]
    assert sum(shares[-4:]) < sum(shares[:4]) - 0.2, shares


@pytest.mark.parametrize(
    ("pair", "template"), [("qwen3-8b-base", "qwen"), ("gemma-3-4b-pt", "gemma"), ("mistral-7b", "gemma")]
)
def test_the_share_of_finished_answers_does_not_fall(
    pair: str, template: str, finished_run: Path, tmp_path: Path, demo_cache: Path
) -> None:
    line, turn = pair_of(pair, template, finished_run, tmp_path, demo_cache)
    done = taught(line, tmp_path)
    assert "student sees (plain)" in done.stderr
    assert "teacher sees (chat)" in done.stderr
    assert f"({turn}) for the teacher, and each stands for the other" in done.stderr
    shares = [row["length/finished_share"] for row in metrics(tmp_path / "runs" / "grpo-minillm")]
    assert sum(shares[:4]) / 4 > 0.1
    # Of 256 answers each: where they no longer end the sum falls by more than 1, and chance moves it by 0.15.
    assert sum(shares[-4:]) >= sum(shares[:4]) - 0.4


def taught(line: list[str], folder: Path) -> CompletedProcess[str]:
    """The run of `pair_of` to its end."""
    with served(folder / "teacher", folder) as there:
        return finish_forked([*line, *there], GRPO_KD_TEACHER_SECRET=SECRET)


def pair_of(pair: str, template: str, finished_run: Path, tmp_path: Path, demo_cache: Path) -> tuple[list[str], int]:
    """The command of 20 steps with this pair, and what ends the teacher's turn."""
    config = yaml.safe_load((finished_run / "config.yaml").read_text())
    teacher, student = tmp_path / "teacher", Path(config["student"]["path"])
    teacher.mkdir()
    turn = instruct(Path(config["teacher"]["path"]), teacher, TEMPLATES[template])
    if pair == "mistral-7b":
        with_another_tokenizer(student, tmp_path / "student")
        student = tmp_path / "student"
    # Questions with short answers: what the teacher tells of a country does not end within twelve tokens.
    files = {"prompts": "warmup", "warmup": "warmup", "heldout": "heldout", "text": "text"}
    data = [f"--data.{name}={config['data'][file]}" for name, file in files.items()]
    models = [f"--student.path={student}", f"--teacher.path={teacher}", "--student.prompt=plain"]
    learning = ["--steps=20", "--actor.learning_rate=3e-3", "--actor.schedule=cosine", "--actor.warmup_steps=10"]
    return [*command(tmp_path / "runs", demo_cache), *data, *models, *learning], turn
