"""Rows from more than JSONL: CSV, Parquet, plain text, and data sets of the hub or of a local folder.

Each row comes with its place (`file:line`, `file:row 7`), which errors name. Data sets are read with the `datasets`
library, which is imported only when one is asked for.

    data/questions.csv        a header line; `answers` holds one answer, or a JSON list of them
    data/questions.parquet    one row a question
    data/text.txt             one text a line
    EuroEval/foqa:test        a data set of the hub, split `test` (train where none is named)
    data/foqa:val             a local folder in the same layout, or one that `save_to_disk` wrote
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Placed = tuple[str, dict[str, Any]]
"""(where the row stands, the row)."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
FILES = (".csv", ".tsv", ".parquet", ".txt")


def is_table(path: str | Path) -> bool:
    """Whether `path` names something that this module reads."""
    name, _ = _split_of(str(path))
    if Path(path).is_file() or Path(path).suffix in (*FILES, ".jsonl", ".json"):
        return Path(path).suffix in FILES
    return Path(name).is_dir() or HUB_ID.fullmatch(name) is not None


def read_table(path: str | Path) -> Iterator[Placed]:
    """All rows with their places. Raises ValueError where there is nothing to read, or where it cannot be read."""
    file = Path(path)
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet, ".txt": _read_text}
    if file.suffix not in readers or Path(_split_of(str(path))[0]).is_dir():
        yield from _read_dataset(str(path))
        return
    if not file.is_file():
        raise ValueError(f"{file}: no such file; give the path of a {file.suffix} file")
    try:
        yield from readers[file.suffix](file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 ({error.reason}); save the file as UTF-8") from None


def _read_csv(file: Path) -> Iterator[Placed]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
        try:
            for row in reader:
                where = f"{file}:{reader.line_num}"
                if None in row or None in row.values():
                    columns = ", ".join(reader.fieldnames or [])
                    raise ValueError(f"{where}: not as many fields as the header ({columns}); quote commas in a field")
                yield where, _row({key: value if value else None for key, value in row.items()}, where)
        except csv.Error as error:
            raise ValueError(f"{file}:{reader.line_num}: not CSV ({error})") from None


def _read_parquet(file: Path) -> Iterator[Placed]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as content:
            number = 0
            for batch in content.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}:row {number}", _row(row, f"{file}:row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: not Parquet ({' '.join(str(error).split())[:200]})") from None


def _read_text(file: Path) -> Iterator[Placed]:
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            try:
                text = raw.decode("utf-8-sig").strip()
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}:{number}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
            if text:
                yield f"{file}:{number}", {"text": text}


def _read_dataset(path: str) -> Iterator[Placed]:
    import datasets

    name, split = _split_of(path)
    try:
        if (Path(name) / "dataset_info.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(name)
            found = found[split] if isinstance(found, datasets.DatasetDict) else found
        else:
            found = datasets.load_dataset(name, split=split, streaming=True)  # a row in memory at a time
    except Exception as error:  # the library raises many kinds; all mean the same to the user
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path}: no such file, and no data set {name!r} with a split {split!r} ({type(error).__name__}: "
            f"{reason}); give a .jsonl, .csv, .parquet or .txt file, a local folder, or a hub id as owner/name:split"
        ) from None
    for number, row in enumerate(found, start=1):
        yield f"{path}:row {number}", _row(dict(row), f"{path}:row {number}")


def _split_of(path: str) -> tuple[str, str]:
    """(name, split) of `name:split`."""
    name, colon, split = path.rpartition(":")
    return (name, split) if colon and re.fullmatch(r"\w+", split) else (path, "train")


def _row(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The row with `answers` as a list: from SQuAD's {text, answer_start}, a JSON list, or a single text."""
    answers = row.get("answers")
    if isinstance(answers, dict) and "text" in answers:
        row["answers"] = list(dict.fromkeys(answers["text"]))
    elif isinstance(answers, str) and answers.lstrip().startswith("["):
        try:
            row["answers"] = json.loads(answers)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where}: key 'answers' is no JSON list ({error.msg}); write one answer, or a list"
            ) from None
    elif isinstance(answers, str):
        row["answers"] = [answers]
    return row
