"""Real weights: Gemma-3-270M reads what SmolLM2-135M wrote, and its scores come back on SmolLM2's tokens.

Needs the two models as directories `gemma-3-270m` and `smollm2-135m` below the folder that GRPO_KD_MODELS names, and
Faroese sentences in ../shared/data/faroese.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from pathlib import Path

import pytest
import torch

from rewards.alignment import carry
from tests.support.runs import ROOT
from training.teacher.token_bytes import TokenBytes
from training.teacher.translation import Translator

MODELS = Path(os.environ.get("GRPO_KD_MODELS", "models"))
TEXT = ROOT.parent / "shared" / "data" / "faroese" / "wiki_sentences.jsonl"
SENTENCES = 40
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (MODELS / "gemma-3-270m").is_dir(), reason="GRPO_KD_MODELS names no folder with the models"),
    pytest.mark.skipif(not TEXT.is_file(), reason="no Faroese text beside the repository"),
]


@torch.no_grad()
def test_the_sum_is_hugging_faces_sequence_log_probability() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    student, teacher = (AutoTokenizer.from_pretrained(MODELS / n) for n in ("smollm2-135m", "gemma-3-270m"))
    model = AutoModelForCausalLM.from_pretrained(MODELS / "gemma-3-270m", dtype=torch.float32).eval()
    translator = Translator(TokenBytes(student, "student"), TokenBytes(teacher, "teacher"))
    with TEXT.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line, _ in zip(lines, range(SENTENCES), strict=False)]
    worst, shared = 0.0, 0
    for before, text in itertools.pairwise(texts):
        response = [*student(" " + text, add_special_tokens=False)["input_ids"], student.eos_token_id]
        prompt = teacher(before)["input_ids"]
        # What Hugging Face makes of prompt, text and end symbol, without anything of ours.
        own = [*teacher(" " + text, add_special_tokens=False)["input_ids"], teacher.eos_token_id]
        logits = model(torch.tensor([[*prompt, *own]])).logits[0, len(prompt) - 1 : -1]
        expected = float(logits.double().log_softmax(-1).gather(-1, torch.tensor(own)[:, None]).sum())

        read = translator.translate(response, finished=True, end_token=teacher.eos_token_id)
        logits = model(torch.tensor([[*prompt, *read.tokens]])).logits[0, len(prompt) - 1 : -1]
        # Float64 on both sides: torch's float32 log-softmax over 262,144 entries is off by up to 1.3e-3 a sentence.
        scores = logits.double().log_softmax(-1).gather(-1, torch.tensor(read.tokens)[:, None])[:, 0]
        carried = carry(scores.tolist(), read.student_token, len(response))
        assert all(math.isfinite(value) for value in carried)
        worst = max(worst, abs(sum(carried) - expected))
        shared += sum(value != 0 for value in carried)
    print(f"{SENTENCES - 1} sentences: totals differ by at most {worst:.1e} nats; {shared} student tokens have a score")
    assert worst < 1e-3
    assert shared > 5 * SENTENCES
