"""Whatever is in a file, its reader gives rows or says in one line which file it is; it is never another error."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from configs.io.files import fingerprint, parse_json, read_json
from configs.io.jsonl import read_jsonl, read_open_questions, read_questions, read_texts
from configs.io.results import read_result
from training.run.checkpoint_files import Manifest
from training.run.run_folder import RunFolder

TURNS = [{"role": "user", "content": "Hvat?"}, {"role": "assistant", "content": "eitt"}]
GOOD = json.dumps({"text": "Føroyar", "question": "Hvat?", "answers": ["eitt"], "format": 1, "step": 1}).encode()
DEEP = b"[" * 200_000
DIGITS = b'{"text": ' + b"7" * 5_000 + b"}"

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
ROW = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(("text", "question", "context", "answers", "format", "values", "files", "step"), JSON)
    | dict.fromkeys(("messages", "prompt", "completion"), JSON | st.lists(st.sampled_from(TURNS), max_size=3))
    | dict.fromkeys(("instruction", "input", "output"), JSON),
)
BROKEN = (
    st.binary(max_size=200)
    | JSON.map(lambda value: json.dumps(value).encode())
    | ROW.map(lambda row: json.dumps(row).encode())
    | st.tuples(st.integers(0, len(GOOD)), st.binary(max_size=3)).map(lambda t: GOOD[: t[0]] + t[1] + GOOD[t[0] :])
    | st.integers(0, len(GOOD)).map(lambda end: GOOD[:end])
)


def _packed(path: Path) -> bool:
    return path.write_bytes(gzip.compress(path.read_bytes())[: 4 + 7 * path.stat().st_size]) > 0


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "text": ("rows.jsonl", lambda path: [row["text"].encode() for row in read_jsonl(path, ["text"])]),
    "questions": ("rows.jsonl", lambda path: [row["question"].encode() for row in read_questions(path)]),
    "open questions": ("rows.jsonl", lambda path: read_open_questions(path)),
    "questions without answers": ("rows.jsonl", lambda path: read_questions(path, answers=False)),
    "json": ("rows.json", lambda path: read_questions(path)),
    "gz": ("rows.jsonl.gz", lambda path: read_questions(path)),
    "packed": ("rows.JSON.gz", lambda path: _packed(path) and read_questions(path)),
    "texts": ("rows.TXT", lambda path: read_texts(path)),
    "csv": ("rows.csv", lambda path: read_questions(path)),
    "CSV": ("rows.CSV", lambda path: read_questions(path)),
    "parquet": ("rows.parquet", lambda path: read_questions(path)),
    "a model's config": ("config.json", read_json),
    "a result": ("f1.json", read_result),
    "a manifest": ("manifest.json", lambda path: Manifest.read(path.parent)),
    "an evaluation": ("before.json", lambda path: RunFolder(path.parent).read_json(path.name)),
}


@pytest.mark.parametrize("reader", READERS)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=BROKEN)
@example(content=DEEP)
@example(content=b'{"a":' * 100_000)
@example(content=DIGITS)
@example(content=b'{"text": "\\ud800", "question": "\\udfff", "answers": ["x"]}')
@example(content=b'{"text": ["a", "b"], "question": 5, "answers": ["x"]}')
@example(content=b'{"text": 5, "question": {"a": 1}, "answers": {"text": [1]}}')
@example(content=b'{"text": NaN, "question": Infinity, "answers": "[[["}')
@example(content=b"\x1f\x8b\x08\x00abc")
@example(content=b"question,answers\nHvat?,[" + b"[" * 100_000)
@example(content=b"question,answers\n\x00,\x00\n")
@example(content=b"")
@example(content=b'{"messages": "Hvat?"}')
@example(content=b'{"prompt": [{"role": "user", "content": "Hvat?"}], "completion": {"content": 5}}')
@example(content=b'[{"instruction": [1], "output": {}}, 7]')
@example(content=b"[" * 64 + b'"')
def test_it_is_read_or_named(reader: str, content: bytes, tmp_path: Path) -> None:
    name, read = READERS[reader]
    path = tmp_path / name
    path.write_bytes(content)
    said = name
    try:
        read(path)
    except UnicodeError:
        raise
    except ValueError as error:
        said = str(error)
    assert name in said or str(tmp_path) in said
    assert len(said) < 1000


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (b'{"text": "a\\ud800b"}', "half of a surrogate pair"),
        (b'{"text": "a", "text": "b"}', "key 'text' is there twice"),
        (b'{"text": ["a b", "c d"]}', "key 'text' is a list; write a string"),
        (b'{"text": 5}', "key 'text' is a int; write a string"),
        (DIGITS, "digits"),
        (DEEP, "nested too deep"),
        (b"\x1f\x8b\x08\x00\x00", "compressed"),
        (b'{"text": "' + b"a" * 50_000_000 + b'"}', "a line of more than 16 MiB"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rows_are_named_with_the_mend(row: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "ok"}\n' + row + b"\n")
    with pytest.raises(ValueError, match=r"rows.jsonl:2: ") as raised:
        read_jsonl(path, ["text"])
    assert said in str(raised.value)


def test_characters_beyond_the_first_65536_are_whole() -> None:
    assert parse_json('{"text": "\\ud83d\\ude00"}', strict=True) == {"text": "😀"}


def test_a_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    file, folder = tmp_path / "a.jsonl", tmp_path / "data"
    assert fingerprint(file) == fingerprint(folder) == ""
    file.write_bytes(b"a" * (20 << 20))
    whole, sampled = fingerprint(file), fingerprint(file, whole=False)
    with file.open("r+b") as out:
        out.seek(10 << 20)
        out.write(b"b")
    assert fingerprint(file) != whole
    assert fingerprint(file, whole=False) != sampled, "by the time of its last change"
    folder.mkdir()
    (folder / "train.jsonl").write_text("old")
    before = fingerprint(folder)
    (folder / "train.jsonl").write_text("new")
    assert fingerprint(folder) != before
    (folder / "train.jsonl").write_text("old")
    assert fingerprint(folder) == before, "whenever it was written"
    (folder / "train.jsonl").rename(folder / "test.jsonl")
    assert fingerprint(folder) != before
