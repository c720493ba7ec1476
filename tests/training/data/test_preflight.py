"""Checks of what was read: whether a teacher has room for what the student's tokenizer left room for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from configs.prompts import Format
from configs.schema import DataConfig, RunConfig, SamplingConfig, SFTConfig, StudentConfig, TeacherConfig
from inference.attention.packing import Group
from tests.support.tiny_tokenizers import build_tokenizer, save_tiny
from training.data import preflight
from training.data.preflight import (
    check_context,
    check_output,
    check_room,
    check_served_room,
    check_vocabulary,
    context_length,
    with_model_directories,
)
from training.experience import Prompt
from training.supervised import cloned, read_text
from training.teacher.mixing import check_cache


def test_a_prompt_that_a_teacher_has_no_room_for_is_named(tmp_path: Path) -> None:
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
    (tmp_path / "config.json").write_text(json.dumps({"n_positions": 30}))
    served = SimpleNamespace(info=lambda: SimpleNamespace(max_positions=29))
    link = SimpleNamespace(client=served, facts=SimpleNamespace(path=tmp_path, teacher=asked))
    with pytest.raises(ValueError, match=r"teacher\.path = .*, as it is served, needs 22 .*context of 29 leaves 21"):
        check_served_room("teacher.path", link, config, [prompt])  # type: ignore[arg-type]
    (tmp_path / "config.json").write_text(json.dumps({"n_positions": 29}))
    check_served_room("teacher.path", link, config, [prompt])  # type: ignore[arg-type]  # looked through once


REFUSES = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{% endfor %}ok"
)


def test_a_teachers_template_takes_every_prompt_before_the_first_step() -> None:
    """A student that is asked in plain text takes them all, so that nothing else would show it before that prompt comes
    up. A conversation is asked as the turns that it is."""
    refusing = build_tokenizer("byte_level")
    refusing.chat_template = REFUSES
    turns = ({"role": "system", "content": "Svara stutt."}, {"role": "user", "content": "Hvat?"})
    prompts = [
        Prompt(index=0, text="Hvat?", tokens=(1,), answers=(), question="Hvat?"),
        Prompt(index=1, text="system: Svara stutt.", tokens=(1,), answers=(), question="Hvat?", turns=turns),
    ]
    check_room("teachers[0].path = 'x'", Format(refusing, "chat"), 500, RunConfig(), prompts[:1])
    check_room("teachers[0].path = 'x'", Format(refusing, "plain"), 500, RunConfig(), prompts)
    with pytest.raises(
        ValueError, match=r"^teachers\[0\]\.path = 'x': its chat template failed \(no system\) for 'system: Svara stutt"
    ):
        check_room("teachers[0].path = 'x'", Format(refusing, "chat"), 500, RunConfig(), prompts)


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


@pytest.mark.parametrize(
    ("settings", "longest"),
    [
        ({"max_position_embeddings": 64}, 64),
        ({"text_config": {"max_position_embeddings": 64}}, 64),
        ({"max_position_embeddings": 64, "rope_scaling": {"type": "su"}, "original_max_position_embeddings": 8}, 8),
        (
            {
                "max_position_embeddings": 64,
                "rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 8},
            },
            8,
        ),
        ({"max_position_embeddings": 64, "rope_parameters": {"rope_type": "yarn"}}, 64),
        ({}, None),
    ],
)
def test_the_context_ends_where_longrope_would_turn_all_tokens(
    settings: dict[str, Any], longest: int | None, tmp_path: Path
) -> None:
    """Phi 3 and 4: the tokens before would have other probabilities as soon as one is past the first context."""
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert context_length(tmp_path) == longest


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


def test_what_a_mixing_teacher_holds_has_to_fit_into_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server would refuse the first step that takes long prompts, in the middle of a run."""
    asked = Format(build_tokenizer("byte_level"))
    prompts = [Prompt(n, text, (1,), (), text) for n, text in enumerate(("A", "AB", "ABQ", "ABQX"))]
    lengths = sorted(len(asked.prompt(prompt.text)) for prompt in prompts)

    def check(cache: int, at_once: int = 0, mix: float = 0.2, address: str | None = None) -> None:
        sampling = SamplingConfig(group_size=2, max_new_tokens=8, teacher_mix=mix, prompts_at_once=at_once)
        teacher = TeacherConfig(max_cache_tokens=cache, address=address)
        check_cache(RunConfig(sampling=sampling, teacher=teacher, prompts_per_step=4), asked, prompts)

    whole, half = sum(lengths) + 4 * 2 * 8, sum(lengths[2:]) + 2 * 2 * 8
    check(whole)
    with pytest.raises(ValueError, match=rf"teacher\.max_cache_tokens = {whole - 1}: .* {whole} tokens of 4 prompts"):
        check(whole - 1)
    check(1, mix=0.0)
    check(half, at_once=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    check(2 * half)  # both ranks ask one server
    check(half, address="one:1, other:1")
    with pytest.raises(ValueError, match=rf"up to {2 * half} tokens of 4 prompts .*\(2 ranks ask one server\)"):
        check(2 * half - 1)


def test_raw_text_and_answers_have_rows_in_the_students_embedding(tmp_path: Path) -> None:
    """A word that was added to the tokenizer alone may stand in the raw text and in no prompt."""
    model = save_tiny(tmp_path / "student", "byte_level")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["Streymoy"])
    tokenizer.save_pretrained(model)
    (tmp_path / "text.jsonl").write_text("".join(f'{{"text": "the sea {n}"}}\n' for n in range(50)))
    data = DataConfig(text=str(tmp_path / "text.jsonl"), text_block_tokens=8)
    config = RunConfig(
        student=StudentConfig(path=str(model)), data=data, cache_dir=str(tmp_path), sft=SFTConfig(batch=1)
    )
    assert read_text(config, Format(tokenizer))
    (tmp_path / "text.jsonl").write_text('{"text": "Streymoy"}\n' + (tmp_path / "text.jsonl").read_text())
    with pytest.raises(
        ValueError, match=r"student\.path = .*: its tokenizer gives token 400, and the model has 400 rows"
    ):
        read_text(config, Format(tokenizer))


def test_a_text_is_looked_through_only_where_the_tokenizer_has_more_than_the_model(tmp_path: Path) -> None:
    """At every start, on every rank, the whole file would be read. The teacher's tokenizer may have grown as well."""

    class Unread:
        highest = property(lambda self: pytest.fail("the whole text was read"))

    model = save_tiny(tmp_path / "model", "byte_level")
    tokenizer = AutoTokenizer.from_pretrained(model)
    check_vocabulary("student.path", model, Format(tokenizer), iter(()), Unread())  # type: ignore[arg-type]
    tokenizer.add_tokens(["Streymoy"])
    asked = Format(tokenizer)
    prompts = (asked.prompt(text) for text in ("the sea", "Streymoy"))
    with pytest.raises(
        ValueError, match=r"^teachers\[0\]\.path = .*: its tokenizer gives token 400, and the model has"
    ):
        check_vocabulary("teachers[0].path", model, asked, prompts)
    check_vocabulary("teachers[0].path", model, asked, (asked.prompt("the sea"),))


def test_an_output_that_would_be_lost_is_refused(tmp_path: Path) -> None:
    """The export takes the place of the whole folder."""

    def check(output: Path, student: Path = tmp_path / "none") -> None:
        check_output(RunConfig(sft=SFTConfig(output=str(output)), student=StudentConfig(path=str(student))))

    models = tmp_path / "models"
    (models / "mine").mkdir(parents=True)
    check(tmp_path / "new")
    check(models / "mine")
    (models / "mine" / "config.json").write_text("{}")
    check(models / "mine")
    for output in (models, models / "mine" / "config.json"):
        with pytest.raises(ValueError, match=r"^sft\.output = .*: what is there is no model"):
            check(output)
    with pytest.raises(ValueError, match=r"^sft\.output = .*: is student\.path itself"):
        check(models / "mine", models / "mine")


def test_a_run_that_goes_on_asks_the_hub_for_nothing_newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tmp_path / "models--org--seven-b" / "snapshots" / "first"
    first.mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text(f"student:\n  path: {first}\n")
    monkeypatch.setattr(preflight, "model_directory", lambda key, path, weights: Path(path))
    config = RunConfig(name="mine", runs_dir=str(tmp_path), student=StudentConfig(path="org/seven-b"))
    assert with_model_directories(config).student.path == str(first)
    assert with_model_directories(replace(config, name="new")).student.path == "org/seven-b"
