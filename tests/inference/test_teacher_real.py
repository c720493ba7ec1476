"""Real weights: Gemma-3-270M and SmolLM2-135M against Hugging Face on Faroese text.

Needs the two models as directories `gemma-3-270m` and `smollm2-135m` below the folder that GRPO_KD_MODELS names, and
Faroese sentences in ../shared/data/faroese.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.inference.test_teacher_models import run_ranks
from tests.support.runs import ROOT

MODELS = Path(os.environ.get("GRPO_KD_MODELS", "models"))
TEXT = ROOT.parent / "shared" / "data" / "faroese" / "wiki_sentences.jsonl"
RANKS = {"gemma-3-270m": (1, 2, 4), "smollm2-135m": (1, 3)}
TOKENS = 2000
TOLERANCE = 2e-4
ANSWERS = 8
"""Prompts that Hugging Face answers greedily too."""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (MODELS / "gemma-3-270m").is_dir(), reason="GRPO_KD_MODELS names no folder with the models"),
    pytest.mark.skipif(not TEXT.is_file(), reason="no Faroese text beside the repository"),
]


def groups_of_text(tokenizer: Any) -> list[tuple[list[int], list[list[int]]]]:
    """Sentences as prompts, each with the next three as responses, until TOKENS response tokens."""
    with TEXT.open() as lines:
        ids = (tokenizer(json.loads(line)["text"])["input_ids"] for line in lines)
        texts = (i for i in ids if len(i) > 5)
        groups: list[tuple[list[int], list[list[int]]]] = []
        while sum(len(r) for _, responses in groups for r in responses) < TOKENS:
            groups.append((next(texts), [next(texts) for _ in range(3)]))
    return groups


@torch.no_grad()
def hugging_face(model: Any, groups: list[tuple[list[int], list[list[int]]]]) -> tuple[torch.Tensor, list[list[int]]]:
    """Log-probabilities of all response tokens from plain rows, and greedy answers of 24 tokens."""
    scores, answers = [], []
    for prompt, responses in groups:
        for response in responses:
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            scores.append(logits.float().log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0])
        if len(answers) == ANSWERS:
            continue
        ids = torch.tensor([prompt])
        answer = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, eos_token_id=None
        )
        answers.append(answer[0, len(prompt) :].tolist())
    return torch.cat(scores), answers


@pytest.mark.parametrize("name", RANKS)
def test_log_probabilities_and_greedy_answers(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    groups = groups_of_text(AutoTokenizer.from_pretrained(MODELS / name))
    model = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    expected, answers = hugging_face(model, groups)
    del model
    assert len(expected) >= TOKENS
    file = tmp_path / "groups.json"
    file.write_text(json.dumps(groups))
    for size in RANKS[name]:
        out = run_ranks(size, ["--groups", str(file), f"m={MODELS / name}"], tmp_path / f"{size}.safetensors", 1500)
        difference = (out["m/score"] - expected).abs().max().item()
        got = [part.tolist() for part in out["m/tokens"].split(out["m/lengths"].tolist())][:ANSWERS]
        print(f"{name}, {size} ranks: {len(expected)} tokens, largest difference {difference:.1e} nats, "
              f"mean {expected.mean():.4f}; {sum(map(len, got))} greedy tokens equal: {got == answers}")  # fmt: skip
        assert difference < TOLERANCE
        assert got == answers
