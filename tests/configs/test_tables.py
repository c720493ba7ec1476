"""Whatever rows are kept in, they are read alike; errors name the file and the row."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.io import tables
from configs.io.files import fingerprint
from configs.io.jsonl import read_jsonl, read_questions, read_texts
from configs.io.tables import content, data_set
from tests.support.hub_server import Hub
from tests.support.runs import ROOT, environment

ROW = {"question": "Hvør?", "context": "Havnin, ið er stór.", "answers": ["Havn", "Havnin"], "id": "7"}
SQUAD = {**ROW, "answers": {"text": ["Havn", "Havn", "Havnin"], "answer_start": [0, 0, 0]}}
"""FoQA's own layout."""


def lines(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def parquet(file: Path, *rows: dict[str, Any]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)
    return file


def test_csv(tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    file.write_text(
        'id,question,context,answers\n7,Hvør?,"Havnin, ið er stór.","[""Havn"", ""Havnin""]"\n8,Hvar?,,Her\n',
        encoding="utf-8",
    )
    assert read_questions(file) == [ROW, {"id": "8", "question": "Hvar?", "context": None, "answers": ["Her"]}]
    (tmp_path / "data.tsv").write_text("question\tanswers\nHvør?\tHon, og hann\n", encoding="utf-8")
    assert read_questions(tmp_path / "data.tsv") == [{"question": "Hvør?", "answers": ["Hon, og hann"]}]
    file.write_text('messages\n"[{""role"": ""user"", ""content"": ""Hvør?""}]"\n', encoding="utf-8")
    assert read_questions(file, answers=False) == [{"question": "Hvør?", "prompt": "Hvør?"}]
    file.write_text("text\n" + "orð " * 50_000 + "\n", encoding="utf-8")
    assert len(read_jsonl(file, ["text"])[0]["text"]) == 200_000, "longer than the csv module's own limit"


@pytest.mark.parametrize(
    ("content", "line", "problem"),
    [
        ("question,answers\nx,y\n,y\n", 3, "'question' is empty"),
        ("question,answers\nx,y,z\n", 2, "not as many fields"),
        ("question,answers\nx\n", 2, "not as many fields"),
        ('question,answers\nx,"[1, 2]"\n', 2, "write a list of strings"),
        ('question,answers\nx,"[""y"""\n', 2, "no JSON list"),
        ("question,answers\n", None, "no row"),
        ("question,answers,answers\nx,y,z\n", 1, "column 'answers' is there twice"),
        ("question;answers\nx;y\n", 1, "part columns with commas"),
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
    assert read_texts(file) == read_texts(file.rename(tmp_path / "text.fo")) == ["Føroyar", "18 oyggjar"]
    packed = tmp_path / "text.txt.gz"
    packed.write_bytes(gzip.compress((tmp_path / "text.fo").read_bytes()))
    assert read_texts(packed) == ["Føroyar", "18 oyggjar"]
    file.write_bytes(b"ein\n\xe1\n")
    with pytest.raises(ValueError, match="not UTF-8") as caught:
        read_jsonl(file, ["text"])
    assert str(caught.value).startswith(f"{file}:2: ")


def test_parquet(tmp_path: Path) -> None:
    file = parquet(tmp_path / "data.parquet", SQUAD, {**SQUAD, "question": ""})
    with pytest.raises(ValueError, match="'question' is empty") as caught:
        read_questions(file)
    assert str(caught.value).startswith(f"{file}:row 2: ")
    assert read_questions(parquet(file, SQUAD)) == [ROW]
    file.write_bytes(b"PAR0")
    with pytest.raises(ValueError, match="not Parquet"):
        read_questions(file)


def test_a_json_file_is_one_list_or_an_object_a_line(tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    for written in (lines(SQUAD, ROW), b"\xef\xbb\xbf\n" + json.dumps([SQUAD, ROW], indent=2).encode()):
        file.write_bytes(written)
        assert read_questions(file) == [ROW, ROW]
    file.write_text(json.dumps([ROW, 5]))
    with pytest.raises(ValueError, match=r"data\.json:row 2: a int, not an object"):
        read_questions(file)
    file.write_text('[{"question": "x"},')
    with pytest.raises(ValueError, match=r"data\.json: not one JSON list"):
        read_questions(file)


@pytest.mark.parametrize("name", ["DATA.JSONL", "data.Json", "data.jsonl.gz", "DATA.JSON.GZ", "data.jsonl.packed"])
def test_suffixes(name: str, tmp_path: Path) -> None:
    """A packed file is seen by its first bytes; line numbers are those of what is in it."""
    file = tmp_path / name
    packed = gzip.compress if name[-1] in "zZd" else bytes
    file.write_bytes(packed(lines(ROW, SQUAD)))
    assert read_questions(file) == [ROW, ROW]
    file.write_bytes(packed(lines(ROW) + b"{\n"))
    with pytest.raises(ValueError, match=re.escape(name) + ":2: not JSON"):
        read_questions(file)


def test_a_damaged_gzip_is_named(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl.gz"
    whole = gzip.compress(lines(*[{**ROW, "id": str(i)} for i in range(2000)]))
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"data\.jsonl\.gz: its gzip is damaged"):
        read_questions(file)


def test_a_folder_in_the_layout_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "foqa"
    folder.mkdir()
    for split, name in (("train", "Hvør?"), ("test", "Hvar?")):
        (folder / f"{split}.jsonl").write_bytes(lines({**SQUAD, "question": name}))
    assert read_questions(folder) == [ROW]
    assert read_questions(f"{folder}:test") == [{**ROW, "question": "Hvar?"}]
    with pytest.raises(ValueError, match="'text' is missing") as caught:
        read_jsonl(f"{folder}:test", ["text"])
    assert str(caught.value).startswith(f"{folder}:test:row 1: ")
    with pytest.raises(ValueError, match=r"with a split .nothing.; it has train, test"):
        read_questions(f"{folder}:nothing")


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    import datasets

    one = datasets.Dataset.from_list([SQUAD])
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"val": one}).save_to_disk(tmp_path / "several")
    assert read_questions(tmp_path / "one") == read_questions(tmp_path / "several") == [ROW]
    assert read_questions(f"{tmp_path}/several:val") == [ROW]
    with pytest.raises(ValueError, match=r"with a split .test.; it has val"):
        read_questions(f"{tmp_path}/several:test")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_columns_by_other_names(suffix: str, tmp_path: Path) -> None:
    """`?ours=theirs` behind whatever is read; what is known of it changes with the columns."""
    rows = [
        {"spurn": "Hvat?", "svar": "Tað", "question": "not this"},
        {"spurn": "Hvør?", "svar": "Hon", "question": "nor this"},
    ]
    file = tmp_path / f"data{suffix}"
    if suffix == ".csv":
        file.write_text("spurn,svar,question\n" + "".join(",".join(row.values()) + "\n" for row in rows))
    elif suffix == ".parquet":
        parquet(file, *rows)
    else:
        file.write_bytes(lines(*rows))
    asked = f"{file}?question=spurn&answers=svar"
    assert [(row["question"], row["answers"]) for row in read_questions(asked)] == [
        ("Hvat?", ["Tað"]),
        ("Hvør?", ["Hon"]),
    ]
    assert read_texts(Path(f"{file}?text=svar")) == ["Tað", "Hon"]
    assert len({content(path) for path in (file, asked, f"{file}?text=svar")}) == 3
    with pytest.raises(ValueError, match=r"no column 'spurning', which '.*' names; it has spurn, svar"):
        read_questions(f"{file}?question=spurning")
    odd = tmp_path / f"what?text=no{suffix}"  # a file that is called so is that file
    odd.write_bytes(file.read_bytes())
    assert read_questions(odd, answers=False)[0]["question"] == "not this"


def test_what_is_a_data_set(tmp_path: Path) -> None:
    assert data_set("owner/name") == {"name": "owner/name", "config": None, "split": None}
    assert data_set("owner/name:test") == {"name": "owner/name", "config": None, "split": "test"}
    assert data_set("owner/name:da-fo:test") == {"name": "owner/name", "config": "da-fo", "split": "test"}
    assert data_set(tmp_path) is not None
    assert data_set(f"{tmp_path}:val") == {"name": str(tmp_path), "config": None, "split": "val"}
    (tmp_path / "a:b").write_bytes(lines(ROW))
    assert read_questions(tmp_path / "a:b") == [ROW]
    for path in ("data/train.jsonl", "data/train.JSONL.gz", tmp_path / "nothing.jsonl", "nothing", "a/b/c"):
        assert data_set(path) is None
        with pytest.raises(ValueError, match=r"no such file; give a \.jsonl"):
            read_questions(path)


HUB = """
import json, sys
from configs.io.jsonl import read_questions
from configs.io.tables import content
print(json.dumps([read_questions(path) for path in sys.argv[1:]] + [content(path) for path in sys.argv[1:]]))
"""


def test_a_data_set_of_the_hub_by_name_and_without_a_network_once_it_is_here(tmp_path: Path) -> None:
    place = tmp_path / "hub" / "mine" / "foqa"
    place.mkdir(parents=True)
    (place / "train.jsonl").write_bytes(lines(SQUAD))
    (place / "test.jsonl").write_bytes(lines({**SQUAD, "question": "Hvar?"}))
    hub = Hub(tmp_path / "hub")
    started = environment() | {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", HUB, "mine/foqa", "mine/foqa:test"]
    try:
        said = [
            subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True, timeout=300).stdout
            for env in (started, started | {"HF_HUB_OFFLINE": "1"})
        ]
    finally:
        hub.close()
    train, test, *states = json.loads(said[0])
    assert (train, test) == ([ROW], [{**ROW, "question": "Hvar?"}])
    assert states[0] != states[1] != ""
    assert said[1] == said[0]


def test_what_is_read_is_known_by_its_content(tmp_path: Path) -> None:
    folder = tmp_path / "foqa"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(lines(ROW))
    before = content(folder)
    assert before == content(f"{folder}:train") == fingerprint(folder) != ""
    (folder / "train.jsonl").write_bytes(lines(SQUAD))
    assert content(f"{folder}:train") != before
    assert content(tmp_path / "nothing.jsonl") == ""


@pytest.mark.parametrize(
    ("magic", "said"),
    [
        (b"\x28\xb5\x2f\xfd\x04", "packed by zstd; unpack it"),
        (b"\xfd7zXZ\x00\x00", "packed by xz; unpack it"),
        (b"BZh91AY&SY\x00", "packed by bzip2; unpack it"),
        (b"PK\x03\x04\x14", "a spreadsheet; give the file in it, or save it as CSV"),
        (b"PAR1\x15", "Parquet; call it .parquet"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt", ".jsonl.zst"])
def test_what_is_no_text_is_called_what_it_is(magic: bytes, said: str, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"data{suffix}"
    file.write_bytes(magic + b"\x00\xff" * 9)
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        read_jsonl(file, ["text"])
    assert str(caught.value).startswith(f"{file}: ")


def test_spaces_around_a_name_in_the_header_are_not_part_of_it(tmp_path: Path) -> None:
    """`question, context` would lose every context without a word."""
    file = tmp_path / "data.csv"
    file.write_text("question, context ,answers\nHvar?,Í Vági.,Vágur\n", encoding="utf-8")
    assert read_questions(file) == [{"question": "Hvar?", "context": "Í Vági.", "answers": ["Vágur"]}]


def test_a_text_without_line_breaks_is_refused_whatever_it_is_kept_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "LONGEST", 100)
    file = tmp_path / "text.txt"
    file.write_text("orð\n" + "orð " * 40)
    with pytest.raises(ValueError, match=r"text\.txt:2: a line of more than"):
        read_jsonl(file, ["text"])


def test_blank_lines_of_a_folder_of_texts_are_left_out_as_those_of_a_file_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.txt").write_text("Føroyar\n\n  \n18 oyggjar\n", encoding="utf-8")
    assert [row["text"] for row in read_jsonl(tmp_path / "folder", ["text"])] == ["Føroyar", "18 oyggjar"]
