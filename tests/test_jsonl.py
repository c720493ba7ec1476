"""Errors of configs/jsonl.py name the file and the line."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.jsonl import read_jsonl


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
