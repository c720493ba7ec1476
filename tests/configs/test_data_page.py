"""docs/data.md: each example is read, and says what the page says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from configs.io.jsonl import read_questions
from configs.io.tables import data_set
from configs.prompts import Format, as_text, render
from configs.schema import DataConfig
from tests.support.runs import ROOT, finish, free_port
from tests.support.tiny_tokenizers import build_tokenizer, save_tiny
from training.data.prompts import load_prompts
from training.run.cli import load_config

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
FIRST = [["Tórshavn", "Havn"], ["1920"], ["1920"], [" Tórshavn"], ["Tórshavn"], ["Tórshavn"], ["Tórshavn"], ["1920"]]


def test_every_layout_is_read(tmp_path: Path) -> None:
    file = tmp_path / "page.jsonl"
    file.write_text("".join(re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)), encoding="utf-8")
    rows = read_questions(file)
    assert [row["answers"] for row in rows] == FIRST
    asked = [as_text(render(row, DataConfig().template)) for row in rows]
    assert asked[1] == asked[2].replace("1920.", "1920 í Vági.")
    assert asked[3:6:2] == ["Hvat eitur høvuðsstaðurin í Føroyum?"] * 2
    assert asked[6].endswith("user: Hvat eitur høvuðsstaðurin?\n\nassistant:")
    assert asked[7] == "Tekstur: Hann varð føddur í 1920.\nSpurningur: Nær varð hann føddur?\nSvar:"


def test_what_is_too_long_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "page.jsonl"
    rows = [{"prompt": "Hvør?"}, {"messages": [{"role": "user", "content": "orð " * 200}]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data, said = DataConfig(prompts=str(file), max_prompt_tokens=50), Format(build_tokenizer("byte_level"))
    (prompt,) = load_prompts("data.prompts", data, said, room=1000, need_answers=False)
    assert (prompt.text, prompt.asked) == ("Hvør?", "Hvør?")
    assert "1 of 2 prompts are too long and are skipped" in caplog.text


def test_the_yaml_names_data_sets(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(# data sets.*?)```", PAGE, re.DOTALL)
    (tmp_path / "my.yaml").write_text(example)
    data = load_config(tmp_path / "my.yaml").data
    assert data_set(data.heldout) == {"name": "EuroEval/foqa", "config": None, "split": "test"}
    assert data_set(data.warmup) is None


def test_from_trl_to_a_run_with_one_yaml_and_one_command(tmp_path: Path) -> None:
    """Own models, own data in TRL's two layouts, the page's YAML and the page's command."""
    for name, seed in (("my-7b", 0), ("my-27b", 1)):
        save_tiny(tmp_path / name, "byte_level", seed)
    numbers = [(f"{a} plus {b} is", f" {a + b}") for a in range(3) for b in range(8)]
    texts = [{"prompt": prompt, "completion": answer} for prompt, answer in numbers]
    chats = [
        {"prompt": [{"role": "user", "content": p}], "completion": [{"role": "assistant", "content": a}]}
        for p, a in numbers
    ]
    for name, rows in (("train", texts), ("test", chats[:4])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (example,) = re.findall(r"```yaml\n(student.*?)```", PAGE, re.DOTALL)
    (command,) = re.findall(r"```bash\n(deepspeed.*?)\n```", PAGE, re.DOTALL)
    small = {"/models": str(tmp_path), "train.jsonl": f"{tmp_path}/train.jsonl", "test.jsonl": f"{tmp_path}/test.jsonl",
             "max_new_tokens: 32": "max_new_tokens: 4", "steps: 200": f"steps: 2\nruns_dir: {tmp_path}"}  # fmt: skip
    for its, ours in small.items():
        assert its in example
        example = example.replace(its, ours)
    (tmp_path / "my.yaml").write_text(example + "threads: 1\n")
    launcher, *arguments = command.replace("my.yaml", str(tmp_path / "my.yaml")).split()
    done = finish([launcher, "--master_port", free_port(), *arguments])
    assert json.loads((tmp_path / "my-run" / "summary.json").read_text())["status"] == "finished"
    assert "student after" in done.stdout
