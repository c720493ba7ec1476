"""SmolLM2-135M: through all four tasks with the real harness, and its generations beside Hugging Face's.

Needs the model as directory `smollm2-135m` below the folder that GRPO_KD_MODELS names; the harness also the extra.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.measures.generation import Decoding, generate
from eval.measures.model import load_model
from tests.support.runs import ROOT, finish
from training.data.demo.splits import build_demo_splits, write_demo_splits

MODEL = Path(os.environ.get("GRPO_KD_MODELS", "models")) / "smollm2-135m"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not MODEL.is_dir(), reason="GRPO_KD_MODELS names no folder with smollm2-135m"),
]
PROMPTS, NEW = 200, 8
ROWS = 4
"""Test rows of each task."""


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load_model(MODEL)


@pytest.mark.parametrize("kind", ["base", "chat"])
def test_greedy_generations_equal_hugging_face(loaded: tuple[Any, Any], kind: str) -> None:
    """200 prompts. Where float32 cannot tell the two likeliest tokens apart, either will do."""
    model, tokenizer = loaded
    sentences = [row["text"] for rows in build_demo_splits()["fosent"].values() for row in rows]
    sentences += [row["text"] for rows in build_demo_splits()["scala-fo"].values() for row in rows]
    shown = "Skjal: Maturin er góður.\nKensla: positivt\n\nSkjal: Bilurin er ljótur.\nKensla: negativt\n\n"
    texts = [f"{shown}Skjal: {sentence}\nKensla:" for sentence in sentences[:PROMPTS]]
    if kind == "chat":
        messages = [[{"role": "user", "content": text}] for text in texts]
        texts = [tokenizer.apply_chat_template(one, add_generation_prompt=True, tokenize=False) for one in messages]
    prompts = [list(tokenizer(text, add_special_tokens=kind == "base")["input_ids"]) for text in texts]
    assert len(prompts) == PROMPTS
    end = tokenizer.eos_token_id
    ours = generate(model, prompts, Decoding(max_new_tokens=NEW, batch=16, ends=frozenset({end}), logprobs=2))
    for prompt, found in zip(prompts, ours, strict=True):
        theirs = hugging_face(model, prompt, end)
        if found.tokens != theirs:
            pairs = zip(found.tokens, theirs, strict=False)
            place = next(index for index, (one, other) in enumerate(pairs) if one != other)
            first, second = sorted(found.logprobs[place].values(), reverse=True)[:2]
            assert first - second < 1e-4, f"position {place}: {found.tokens} and {theirs}"


def hugging_face(model: Any, prompt: list[int], end: int) -> list[int]:
    output = model.generate(
        input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False, max_new_tokens=NEW, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    return output[0, len(prompt) :].tolist()


@pytest.mark.skipif(importlib.util.find_spec("euroeval") is None, reason="needs the extra eval")
def test_all_four_tasks(tmp_path: Path) -> None:
    from tests.eval.euroeval.test_euroeval import check_scores

    write_demo_splits(tmp_path / "splits")
    for file in (tmp_path / "splits").glob("*/test.jsonl"):
        file.write_text("".join(line + "\n" for line in file.read_text().splitlines()[:ROWS]))
    finish(
        [
            sys.executable, str(ROOT / "eval" / "run_euroeval.py"), "--model", str(MODEL),
            "--data", str(tmp_path / "splits"), "--iterations", "2", "--runs_dir", str(tmp_path / "runs"),
            "--cache_dir", str(tmp_path / "cache"),
        ],
        timeout=3500,
    )  # fmt: skip
    [path] = (tmp_path / "runs" / "models").glob("smollm2-135m-*/eval/euroeval.json")
    result = json.loads(path.read_text()) | {"path": str(path)}
    assert result["settings"]["kind"] == "instruct"
    check_scores(result)
    said = {row["task"]: path.parent / row["generations"] for row in result["rows"]}
    assert "{" in json.loads(said["fone"].read_text().splitlines()[0])["generation"]  # it follows the examples
