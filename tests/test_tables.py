"""CSV, Parquet, text and data sets as rows; errors name the file and the row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.jsonl import read_jsonl, read_questions
from configs.tables import is_table

ROW = {"question": "Hvør?", "context": "Havnin, ið er stór.", "answers": ["Havn", "Havnin"], "id": "7"}


def test_csv(tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    file.write_text(
        'id,question,context,answers\n7,Hvør?,"Havnin, ið er stór.","[""Havn"", ""Havnin""]"\n8,Hvar?,,Her\n',
        encoding="utf-8",
    )
    assert read_questions(file) == [ROW, {"id": "8", "question": "Hvar?", "context": None, "answers": ["Her"]}]
    (tmp_path / "data.tsv").write_text("question\tanswers\nHvør?\tHon, og hann\n", encoding="utf-8")
    assert read_questions(tmp_path / "data.tsv") == [{"question": "Hvør?", "answers": ["Hon, og hann"]}]


@pytest.mark.parametrize(
    ("content", "line", "problem"),
    [
        ("question,answers\nx,y\n,y\n", 3, "'question' is empty"),
        ("question,answers\nx,y,z\n", 2, "not as many fields"),
        ("question,answers\nx\n", 2, "not as many fields"),
        ('question,answers\nx,"[1, 2]"\n', 2, "write a list of strings"),
        ('question,answers\nx,"[""y"""\n', 2, "no JSON list"),
        ("question,answers\n", None, "no row"),
    ],
)
def test_bad_csv_rows_are_named(tmp_path: Path, content: str, line: int | None, problem: str) -> None:
    file = tmp_path / "data.csv"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=problem) as caught:
        read_questions(file)
    assert str(caught.value).startswith(f"{file}:{line}: " if line else f"{file}: ")


def test_text_lines(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("\ufeffFøroyar\n\n 18 oyggjar \n", encoding="utf-8")
    assert read_jsonl(file, ["text"]) == [{"text": "Føroyar"}, {"text": "18 oyggjar"}]
    file.write_bytes(b"ein\n\xe1\n")
    with pytest.raises(ValueError, match="not UTF-8") as caught:
        read_jsonl(file, ["text"])
    assert str(caught.value).startswith(f"{file}:2: ")


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / "data.parquet"
    squad = {**ROW, "answers": {"text": ["Havn", "Havn", "Havnin"], "answer_start": [0, 0, 0]}}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([squad, {**squad, "question": ""}]), file)
    with pytest.raises(ValueError, match="'question' is empty") as caught:
        read_questions(file)
    assert str(caught.value).startswith(f"{file}:row 2: ")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([squad]), file)
    assert read_questions(file) == [ROW]
    file.write_bytes(b"PAR0")
    with pytest.raises(ValueError, match="not Parquet"):
        read_questions(file)


def test_a_local_data_set_in_the_layout_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FoQA's columns: SQuAD answers, splits as files."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "foqa"
    folder.mkdir()
    for split, name in (("train", "Hvør?"), ("test", "Hvar?")):
        row = {**ROW, "question": name, "answers": {"text": ["Havn", "Havnin"], "answer_start": [0, 0]}}
        (folder / f"{split}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert read_questions(folder) == [ROW]
    assert read_questions(f"{folder}:test") == [{**ROW, "question": "Hvar?"}]
    with pytest.raises(ValueError, match="'text' is missing") as caught:
        read_jsonl(f"{folder}:test", ["text"])
    assert str(caught.value).startswith(f"{folder}:test:row 1: ")
    with pytest.raises(ValueError, match="no data set"):
        read_questions(f"{folder}:nothing")


def test_what_is_a_table(tmp_path: Path) -> None:
    assert is_table("EuroEval/foqa")
    assert is_table("EuroEval/foqa:test")
    assert is_table(tmp_path)
    assert not is_table("data/train.jsonl")
    assert not is_table(tmp_path / "nothing.jsonl")
    with pytest.raises(ValueError, match="no such file"):
        read_questions(tmp_path / "nothing.csv")
