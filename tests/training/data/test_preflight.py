"""Checks of what was read: whether a teacher has room for what the student's tokenizer left room for."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from configs.prompts import Format
from configs.schema import DataConfig, RunConfig, SamplingConfig, StudentConfig
from inference.attention.packing import Group
from tests.support.tiny_tokenizers import build_tokenizer
from training.data.preflight import check_context, check_room
from training.experience import Prompt
from training.stage2 import check_served_room
from training.supervised import cloned


def test_a_prompt_that_a_teacher_has_no_room_for_is_named() -> None:
    tokenizer = build_tokenizer("byte_level")
    tokenizer.chat_template = "<s>{{ messages[0]['content'] }}</s>"
    asked, config = Format(tokenizer, "chat"), RunConfig(sampling=SamplingConfig(max_new_tokens=8))
    text = "ø" * 10  # two tokens each, and two around them
    prompt = Prompt(index=0, text=text, tokens=(1,), answers=(), question=text)
    assert len(asked.prompt(text)) == 22
    check_room("teacher.path = 'x'", asked, 30, config, [prompt])
    with pytest.raises(
        ValueError, match=r"^data\.max_prompt_tokens = 512: teacher\.path = 'x' needs 22 tokens .*leaves 21"
    ):
        check_room("teacher.path = 'x'", asked, 29, config, [prompt])
    check_room("teacher.path = 'x'", asked, None, config, [prompt])
    served = SimpleNamespace(info=lambda: SimpleNamespace(max_positions=29))
    link = SimpleNamespace(client=served, facts=SimpleNamespace(path="x", teacher=asked))
    with pytest.raises(ValueError, match=r"teacher\.path = 'x', as it is served, needs 22 .*context of 29 leaves 21"):
        check_served_room("teacher.path", link, config, [prompt])  # type: ignore[arg-type]


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


def test_an_answer_of_the_teacher_is_cut_to_the_longest_of_the_student(caplog: pytest.LogCaptureFixture) -> None:
    """In a tokenizer that knows its words less it takes more tokens than the teacher wrote."""
    asked, prompt = Format(build_tokenizer("byte_level")), Prompt(0, "x", (1,), (), "x")
    answers = [[("Høvuðsstaðurin", True), ("in the sea", True), ("", True)]]
    whole = cloned([prompt], answers, asked, None)
    longest = len(asked.answer("in the sea")) + 1
    assert len(whole[0].responses[0]) > longest
    assert not caplog.text
    first, second = cloned([prompt], answers, asked, longest)
    assert first.responses == (whole[0].responses[0][:longest],)
    assert asked.end not in first.responses[0]
    assert second == whole[1]
    assert "1 of 3 answers of the teacher are cut" in caplog.text
