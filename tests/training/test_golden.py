"""Golden traces: five steps of each of the four approaches, number by number, guard the loop.

Random models of a fixed seed on the demo's data: nothing that depends on training elsewhere. After a change that is
meant to change the numbers, write them anew with GRPO_KD_WRITE_GOLDEN=1 and say in the commit why.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from tests.support.forked import finish_forked
from tests.support.runs import command, metrics
from tests.support.teacher_servers import SECRET, serve_forked

GOLDEN = Path(__file__).parent / "golden"
KEYS = ("reward/mean", "kl/teacher", "kl/reference", "length/mean", "loss/policy", "loss/single_step", "loss/pt",
        "loss/value", "grad_norm", "entropy", "clip_share", "tokens/sampled")  # fmt: skip


RATES = {"minillm": "3e-3", "teacher_logprob": "3e-4"}
CRITIC = {
    "minillm": ("--critic.learning_rate", "3e-3"),
    "teacher_logprob": ("--critic.learning_rate", "1e-3", "--ppo.kl_penalty", "0.1"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, finished_run: Path) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Options that name student and teacher, both of seeded random weights with the demo's tokenizer, and the demo's
    settings. The teacher is served on two ranks."""
    settings = yaml.safe_load((finished_run / "config.yaml").read_text())
    source = Path(settings["student"]["path"])
    folder = tmp_path_factory.mktemp("golden")
    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    for seed, (name, size) in enumerate((("student", 32), ("teacher", 64))):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=vocabulary, hidden_size=size, intermediate_size=2 * size, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2,
            tie_word_embeddings=False,
            **{k: v for k, v in json.loads((source / "config.json").read_text()).items() if k.endswith("_token_id")},
        )  # fmt: skip
        transformers.LlamaForCausalLM(config).save_pretrained(folder / name)
        for file in source.glob("*token*"):
            shutil.copy(file, folder / name)
    server = serve_forked(folder / "teacher", folder / "address", folder / "log", tensor_parallel=2)
    paths = {"student.path": "student", "teacher.path": "teacher", "teacher.address": "address"}
    yield [word for key, name in paths.items() for word in (f"--{key}", str(folder / name))], settings["data"]
    server.kill()
    server.wait()


@pytest.mark.parametrize("reward", ["teacher_logprob", "minillm"])
@pytest.mark.parametrize("algo", ["grpo", "ppo"])
def test_five_steps_are_what_they_were(
    algo: str, reward: str, models: tuple[list[str], dict[str, Any]], tmp_path: Path, demo_cache: Path
) -> None:
    names, data = models
    paths = [word for key in ("prompts", "warmup", "heldout", "text") for word in (f"--data.{key}", data[key])]
    finish_forked(
        command(
            tmp_path, demo_cache, *names, *paths, "--algo", algo, "--reward", reward, "--steps", "5",
            "--eval.questions", "4", "--name", "run", "--loss.kl_coef", "0.05",
            "--actor.updates_per_rollout", "2", "--sampling.max_new_tokens", "12",
            "--actor.learning_rate", RATES[reward], "--actor.schedule", "cosine",
            "--actor.warmup_steps", "10", *(CRITIC[reward] if algo == "ppo" else ()),
        ),
        GRPO_KD_TEACHER_SECRET=SECRET,
    )  # fmt: skip
    assert f"reward/{reward}" in metrics(tmp_path / "run")[-1]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["algo"], summary["reward"]) == ("finished", algo, reward)
    trace = [{key: row[key] for key in KEYS if key in row} for row in metrics(tmp_path / "run")]
    file = GOLDEN / f"{algo}_{reward}.json"
    if os.environ.get("GRPO_KD_WRITE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(trace, indent=1) + "\n")
    golden = json.loads(file.read_text())
    assert len(trace) == len(golden) == 5
    for step, (new, old) in enumerate(zip(trace, golden, strict=True), start=1):
        assert new.keys() == old.keys()
        for key, value in old.items():
            assert new[key] == pytest.approx(value, rel=1e-3, abs=1e-5), f"step {step}: {key}"
