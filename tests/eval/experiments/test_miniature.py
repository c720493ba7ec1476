"""The miniature of the real pairs on real weights: Gemma-3-270M teaches SmolLM2-135M, two tokenizers.

Needs the two models as directories `gemma-3-270m` and `smollm2-135m` below the folder that GRPO_KD_MODELS names.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch

from tests.support.runs import ROOT, finish, metrics

MODELS = Path(os.environ.get("GRPO_KD_MODELS", "models"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (MODELS / "gemma-3-270m").is_dir(), reason="GRPO_KD_MODELS names no folder with the models"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    finish(
        [
            sys.executable, str(ROOT / "training" / "main.py"), "--config", "configs/gemma3_270m_smollm2_135m.yaml",
            "--student.path", str(MODELS / "smollm2-135m"), "--teacher.path", str(MODELS / "gemma-3-270m"),
            "--demo_size", "tiny", "--steps", "2", "--prompts_per_step", "2", "--eval.questions", "4",
            "--sampling.max_new_tokens", "12", "--runs_dir", str(runs), "--cache_dir", str(runs / "cache"),
        ],
        timeout=2000,
    )  # fmt: skip
    return runs / "grpo-minillm"


def test_it_runs_and_learns_from_text(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished"
    # The teacher counts its own tokens, so the two numbers differ.
    assert summary["tokens"]["scored"] != summary["tokens"]["sampled"]
    for row in metrics(run):
        assert math.isfinite(row["loss/total"])
        assert row["grad_norm"] > 0
        assert "loss/single_step" not in row
        assert row["mismatch/max"] < 1e-3


def test_the_teachers_score_is_that_of_its_own_tokens_in_transformers(run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    teacher = MODELS / "gemma-3-270m"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(teacher).eval(), AutoTokenizer.from_pretrained(teacher)
    student = AutoTokenizer.from_pretrained(MODELS / "smollm2-135m")
    sample = json.loads((run / "samples.jsonl").read_text().splitlines()[0])
    prompt = tokenizer(sample["prompt"])["input_ids"]
    checked = right = 0
    for text, reward in zip(sample["responses"], sample["rewards"]["teacher"], strict=True):
        if not text or len(student(" " + text)["input_ids"]) < 12:
            continue  # a finished response has an end symbol besides its text
        # The log has the text stripped, the teacher reads it as it was written: with white space around it.
        totals = []
        for lead, tail in itertools.product((" ", "", "\n", "\n\n"), ("", " ", "\n", "\n\n")):
            tokens = tokenizer(lead + text + tail, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
            totals.append(float(logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None]).sum()))
        checked += 1
        right += any(reward == pytest.approx(total, abs=1e-2) for total in totals)
    assert checked > 0
    assert right == checked
