"""Errors of configs/io/jsonl.py name the file and the line."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.io.jsonl import read_jsonl, read_questions


def test_rows_are_read(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes('\ufeff{"text": "Føroyar\u2028eru"}\r\n\n{"text": "18 oyggjar", "id": 7}'.encode())
    assert read_jsonl(path, ["text"]) == [{"text": "Føroyar\u2028eru"}, {"text": "18 oyggjar", "id": 7}]


@pytest.mark.parametrize(
    ("content", "line", "problem"),
    [
        (b"", None, "has no row"),
        (b"\n  \n", None, "has no row"),
        (b'{"question": "x"}\n{"question": \n', 2, "not JSON"),
        (b'{"question": "x"}\n\n["question"]\n', 3, "not an object"),
        (b'{"question": "x"}\n{"answers": ["y"]}\n', 2, "'question' is missing"),
        (b'{"question": "  "}\n', 1, "'question' is empty"),
        (b'{"question": null}\n', 1, "'question' is empty"),
        (b'{"question": "x"}\n{"question": "\xe1"}\n', 2, "not UTF-8"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, content: bytes, line: int | None, problem: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=problem) as caught:
        read_jsonl(path, ["question"])
    assert str(caught.value).startswith(f"{path}:{line}: " if line else f"{path}: ")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.jsonl: no such file"):
        read_jsonl(tmp_path / "nothing.jsonl")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ('{"question": "x", "answers": "Oslo"}', "'answers' is \"Oslo\"; write a list of strings"),
        ('{"question": "x", "answers": ["Oslo", 7]}', "write a list of strings"),
        ('{"question": "x", "answers": ["Oslo", " "]}', "write a list of strings"),
        ('{"question": "x", "answers": []}', "'answers' is empty"),
        ('{"question": 5, "answers": ["Oslo"]}', "'question' is a int; write a string"),
        ('{"question": "x", "context": ["y"], "answers": ["Oslo"]}', "'context' is a list; write a string"),
    ],
)
def test_bad_questions_are_named(tmp_path: Path, row: str, problem: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "x", "context": null, "answers": ["y"], "id": 3}\n' + row, encoding="utf-8")
    with pytest.raises(ValueError, match=problem) as caught:
        read_questions(path)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_prompts_need_no_answers(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "x"}', encoding="utf-8")
    assert read_questions(path, answers=False) == [{"question": "x"}]
    with pytest.raises(ValueError, match="'answers' is missing"):
        read_questions(path)
