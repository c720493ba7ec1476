"""Each layout of a question gives the same row; what is wrong with one is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from configs.io.jsonl import read_open_questions, read_questions
from configs.io.questions import as_question
from configs.prompts import Format, as_text, render
from configs.schema import DataConfig
from tests.support.tiny_tokenizers import build_tokenizer

USER, SAID = {"role": "user", "content": "Hvør?"}, {"role": "assistant", "content": "Havn"}
BEFORE = [{"role": "system", "content": "Stutt."}, {"role": "user", "content": "Hey"}, {**SAID, "content": "Hey!"}]


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"question": "Hvør?", "answers": ["Havn"]}, "Spurningur: Hvør?\nSvar:"),
        ({"question": "Hvør?", "answers": {"text": ["Havn", "Havn"], "answer_start": [3, 9]}}, None),
        ({"question": "Hvør?", "prompt": None, "answers": ["Havn"]}, "Spurningur: Hvør?\nSvar:"),
        ({"messages": [USER, SAID]}, "Hvør?"),
        ({"prompt": "Hvør?", "completion": "Havn"}, "Hvør?"),
        ({"prompt": "Hvør?", "answers": ["Havn"]}, "Hvør?"),
        ({"prompt": [USER], "completion": [SAID]}, "Hvør?"),
        ({"prompt": [USER], "completion": "Havn"}, "Hvør?"),
        ({"instruction": "Hvør?", "input": "", "output": "Havn"}, "Spurningur: Hvør?\nSvar:"),
        ({"instruction": "Hvør?", "input": "Býir.", "output": "Havn"}, "Tekstur: Býir.\nSpurningur: Hvør?\nSvar:"),
        ({"messages": [*BEFORE[1:], USER, SAID]}, "user: Hey\n\nassistant: Hey!\n\nuser: Hvør?\n\nassistant:"),
    ],
)
def test_layouts(row: dict[str, Any], asked: str | None) -> None:
    found = as_question(row, answers=True)
    assert (found["question"], found["answers"]) == ("Hvør?", ["Havn"])
    if asked is not None:
        assert as_text(render(found, DataConfig().template)) == asked


def test_a_conversation_goes_through_the_chat_template_as_it_stands() -> None:
    tokenizer = build_tokenizer("bytes")
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    asked = render(as_question({"messages": [*BEFORE, USER, SAID]}, answers=True), DataConfig().template)
    whole = "[system]Stutt.[user]Hey[assistant]Hey![user]Hvør?[assistant]"
    assert Format(tokenizer, "chat").rendered(asked) == whole
    assert Format(tokenizer, "chat", system="Onnur.").rendered(asked) == whole, "its own system message counts"
    assert Format(tokenizer, "chat", system="Onnur.").rendered(asked[1:]).startswith("[system]Onnur.[user]Hey")
    assert Format(tokenizer, "plain").rendered(asked) == as_text(asked)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": "Hvør?"}, "key 'messages' is a str; write a list of {role, content}"),
        ({"messages": []}, "key 'messages' is a list; write a list of {role, content}"),
        ({"messages": [{"role": "user"}]}, "a role and a content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a role and a content"),
        ({"messages": [SAID]}, "key 'messages' asks nothing"),
        ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]}, "with tool_calls"),
        ({"messages": [USER, SAID], "tools": [{"type": "function"}]}, "key 'tools': the model is told of none"),
        ({"messages": [USER]}, "the row with the key 'messages' has no answer; end it with a turn of the assistant"),
        ({"prompt": "Hvør?"}, "the row with the key 'prompt' has no answer; give it a key 'completion'"),
        ({"prompt": " ", "completion": "x"}, "key 'prompt' is \" \"; write a text"),
        ({"prompt": 5, "completion": "x"}, "key 'prompt' is a int; write a list of {role, content}"),
        ({"prompt": "Hvør?", "completion": 5}, "key 'completion' is a int"),
        ({"prompt": [USER], "completion": [USER]}, "key 'completion' is 1 turns; write one, whose role is assistant"),
        ({"instruction": "Hvør?", "output": 5}, "key 'output' is 5; write a text"),
        ({"instruction": "Hvør?", "output": ""}, "give it a key 'output'"),
        ({"question": "Hvør?", "answers": {"text": [[1]]}}, "key 'answers' is [[1]]; write a list of strings"),
        ({"chosen": "a"}, "key 'question' is missing; each row needs question, answers (or prompt, messages"),
    ],
)
def test_what_is_wrong_is_named(row: dict[str, Any], problem: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "x", "answers": ["y"]}\n' + json.dumps(row), encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: ") as caught:
        read_questions(file)
    assert problem in str(caught.value)


def test_prompts_alone_are_questions_without_answers() -> None:
    assert as_question({"prompt": [USER], "tools": []}, answers=False)["prompt"] == "Hvør?"
    for row in ({"prompt": "Hvør?"}, {"prompt": [USER]}, {"messages": [USER]}):
        assert as_question(row, answers=False) == {"question": "Hvør?", "prompt": "Hvør?"}
    found = as_question({"instruction": "Hvør?", "output": ""}, answers=False)
    assert found["question"] == "Hvør?"
    assert "answers" not in found


@pytest.mark.parametrize("pattern", [None, "", "(", 5, ["a"], "*", "(?P<a>x)(?P<a>y)"])
def test_a_pattern_that_is_none_is_named_with_its_line(pattern: object, tmp_path: Path) -> None:
    file = tmp_path / "open.jsonl"
    rows = [{"question": "Hvør?", "pattern": "Havn|Vágur"}, {"question": "Hvør?", "pattern": pattern}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"open.jsonl:2: key 'pattern'"):
        read_open_questions(file)
    file.write_text(json.dumps(rows[0]))
    assert read_open_questions(file)[0]["pattern"] == "Havn|Vágur"
