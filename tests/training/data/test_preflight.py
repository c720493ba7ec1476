"""Checks of what was read: whether a teacher has room for what the student's tokenizer left room for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.prompts import Format
from configs.schema import DataConfig, RunConfig, SamplingConfig, StudentConfig
from inference.attention.packing import Group
from tests.support.tiny_tokenizers import build_tokenizer
from training.data.preflight import check_context, check_room
from training.experience import Prompt


def test_a_prompt_that_a_teacher_has_no_room_for_is_named(tmp_path: Path) -> None:
    tokenizer = build_tokenizer("byte_level")
    tokenizer.chat_template = "<s>{{ messages[0]['content'] }}</s>"
    asked, config = Format(tokenizer, "chat"), RunConfig(sampling=SamplingConfig(max_new_tokens=8))
    text = "ø" * 10  # two tokens each, and two around them
    prompt = Prompt(index=0, text=text, tokens=(1,), answers=(), question=text)
    assert len(asked.prompt(text)) == 22
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 30}))
    check_room("teacher.path", tmp_path, asked, config, [prompt])
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 29}))
    with pytest.raises(
        ValueError, match=r"^data\.max_prompt_tokens = 512: teacher\.path = .* needs 22 tokens .*leaves 21"
    ):
        check_room("teacher.path", tmp_path, asked, config, [prompt])
    (tmp_path / "config.json").write_text("{}")
    check_room("teacher.path", tmp_path, asked, config, [prompt])


def test_text_and_answers_longer_than_the_students_context_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"n_positions": 64}))
    config = RunConfig(
        student=StudentConfig(path=str(tmp_path)), data=DataConfig(text_block_tokens=65, warmup="w.jsonl")
    )
    short, long = (Group(prompt=(1,) * 60, responses=((1,) * length,)) for length in (4, 5))
    check_context(config, text=False, examples=[short])
    with pytest.raises(
        ValueError, match=r"^data\.text_block_tokens = 65: is more than the 64 tokens of the context of st"
    ):
        check_context(config, text=True)
    with pytest.raises(
        ValueError, match=r"^data\.warmup = 'w\.jsonl': 65 tokens, a prompt with its answer, are more than"
    ):
        check_context(config, text=False, examples=[short, long])
