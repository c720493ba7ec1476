"""Rows of whatever people keep them in, each with its place (`file:line`, `file:row 7`), which errors name.

    data/questions.jsonl      one JSON object a line; .json may also be one list of objects
    data/questions.csv        (.tsv) a header line; `answers` holds one answer, or a JSON list of them
    data/questions.parquet    one row a question
    data/text.txt             one text a line
    data/questions.jsonl.gz   each of these but Parquet, packed by gzip
    data/foqa:val             a folder in the hub's layout, or one that `save_to_disk` wrote; its split `val`
    owner/name:config:split   a data set of the hub. The split is train where none is named, or the only one
    ...?question=spurn&answers=svar   any of these, whose columns are called so

Data sets are read with the `datasets` library, which is imported only when one is asked for. Docs: docs/data.md.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast
from urllib.parse import parse_qsl

from configs.io.files import fingerprint, parse_json

Row = dict[str, Any]
Placed = tuple[str, Row]
"""(where the row stands, the row)."""
DATA_SET = re.compile(r"(?P<name>[^:]+?)(:(?P<config>\w[\w.-]*)(?=:))?(:(?P<split>\w+))?")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
LONGEST = 16 << 20
"""Bytes of a line. A tokenizer takes minutes and gigabytes for a longer one."""
FOREIGN = {
    rb"\x28\xb5\x2f\xfd": "packed by zstd; unpack it, or pack it by gzip",
    rb"\xfd7zXZ\x00": "packed by xz; unpack it, or pack it by gzip",
    rb"BZh[1-9]1AY&SY": "packed by bzip2; unpack it, or pack it by gzip",
    rb"PK\x03\x04": "a zip archive or a spreadsheet; give the file in it, or save it as CSV",
    rb"PAR1": "Parquet; call it .parquet",
}
"""What a file of text may turn out to be, by its first bytes."""


def split_columns(path: str | Path) -> tuple[str, dict[str, str]]:
    """What is read, and the names that its columns have there by the names that they have here (`?ours=theirs&...`)."""
    place, _, query = str(path).partition("?")
    return (place, dict(parse_qsl(query))) if query and not Path(path).exists() else (str(path), {})


def read_rows(path: str | Path) -> Iterator[Placed]:
    """All rows with their places. Raises ValueError where there is nothing to read, or where it cannot be read."""
    place, columns = split_columns(path)
    for where, row in _read_place(place):
        if missing := [name for name in columns.values() if name not in row]:
            raise ValueError(f"{where}: no column {missing[0]!r}, which {str(path)!r} names; it has {', '.join(row)}")
        kept = {key: value for key, value in row.items() if key not in columns.values()}
        yield where, kept | {key: _cell(key, row[name], where) for key, name in columns.items()}


def _read_place(path: str) -> Iterator[Placed]:
    file = Path(path)
    if not file.is_file():
        if data_set(path) is None:
            raise ValueError(
                f"{file}: no such file; give a .jsonl, .json, .csv, .tsv, .parquet or .txt file (each but .parquet "
                "perhaps .gz), a folder, or a data set of the hub as owner/name:split"
            )
        yield from _read_dataset(str(path))
        return
    try:
        yield from READERS.get(layout(file), _read_lines)(file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{file}: its gzip is damaged ({' '.join(str(error).split())}); compress it again") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 ({error.reason}); save the file as UTF-8") from None


def layout(path: Path) -> str:
    """The suffix that says how a file is read: that before .gz, in small letters."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return ([""] + [suffix for suffix in suffixes if suffix != ".gz"])[-1]


def data_set(path: str | Path) -> dict[str, str | None] | None:
    """name, config and split where `path` names a data set, here or on the hub, and not a file."""
    place, _ = split_columns(path)
    if Path(place).is_dir():
        return {"name": place, "config": None, "split": None}
    found = DATA_SET.fullmatch(place)
    if found is None or Path(place).is_file():
        return None
    named = found.groupdict()
    hub = HUB_ID.fullmatch(named["name"]) and (layout(Path(place)) not in READERS or named["split"])
    return named if Path(named["name"]).is_dir() or hub else None


def content(path: str | Path) -> str:
    """What is in a file, folder or data set of the hub, by which caches and resumed runs know it; "" for nothing."""
    place, columns = split_columns(path)
    named, how = data_set(place), repr(sorted(columns.items())) if columns else ""
    if named is None or Path(str(named["name"])).is_dir():
        return fingerprint(place if named is None else str(named["name"])) + how
    return "".join(fingerprint(file["filename"]) for file in _load(place).cache_files) + how


@contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked where they are gzip, whatever it is called."""
    with file.open("rb") as plain:
        first = plain.peek(16)
        if foreign := [what for magic, what in FOREIGN.items() if re.match(magic, first)]:
            raise ValueError(f"{file}: {foreign[0]}")
        if first[:2] != b"\x1f\x8b":
            yield plain
            return
        with gzip.open(plain) as packed:
            yield cast("IO[bytes]", packed)


def _raw_lines(file: Path) -> Iterator[tuple[str, bytes]]:
    """Lines that are not blank, with their places. Binary: a line that is not UTF-8 still has a number, and U+2028
    inside a string ends none."""
    with _opened(file) as lines:
        for number, raw in enumerate(iter(lambda: lines.readline(LONGEST + 1), b""), start=1):
            if len(raw) > LONGEST:
                raise ValueError(f"{file}:{number}: a line of more than {LONGEST >> 20} MiB; break it into rows")
            if raw.strip():
                yield f"{file}:{number}", raw


def _read_lines(file: Path) -> Iterator[Placed]:
    for where, raw in _raw_lines(file):
        yield where, _parse_row(raw, where)


def _parse_row(raw: bytes, where: str) -> Row:
    """One line as a dict, or a ValueError that starts with `where`."""
    try:
        row = parse_json(raw.decode("utf-8-sig"), strict=True)
    except UnicodeDecodeError as error:
        if raw.startswith(b"\x1f\x8b"):
            raise ValueError(f"{where}: the line is compressed (gzip); unpack it first") from None
        raise ValueError(f"{where}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        mend = "write one whole JSON object on each line"
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno}); {mend}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}; correct the row") from None
    return _object(row, where)


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a {type(row).__name__}, not an object; write a JSON object with keys, {{...}}")
    return row


def _read_json(file: Path) -> Iterator[Placed]:
    """One list of objects, or an object a line."""
    with _opened(file) as opened:
        if not opened.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from _read_lines(file)
            return
        opened.seek(0)
        try:
            rows = parse_json(opened.read().decode("utf-8-sig"), strict=True)
        except UnicodeDecodeError:
            raise
        except ValueError as error:
            raise ValueError(
                f"{file}: not one JSON list ({error}); write [{{...}}, ...], or an object a line"
            ) from None
    for number, row in enumerate(rows, start=1):
        yield f"{file}:row {number}", _object(row, f"{file}:row {number}")


def _read_csv(file: Path) -> Iterator[Placed]:
    csv.field_size_limit(LONGEST)
    with _opened(file) as opened:
        lines = io.TextIOWrapper(opened, encoding="utf-8-sig", newline="")
        reader = csv.DictReader(lines, delimiter="\t" if layout(file) == ".tsv" else ",", strict=True)
        try:
            header = reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
            if len(header) == 1 and ";" in header[0]:
                raise ValueError(
                    f"{file}:1: one column, {header[0]!r}; part columns with commas, or with tabs in a .tsv"
                )
            if twice := [name for n, name in enumerate(header) if name in header[:n]]:
                raise ValueError(f"{file}:1: column {twice[0]!r} is there twice; write a JSON list in one")
            for row in reader:
                where = f"{file}:{reader.line_num}"
                if None in row or None in row.values():
                    columns = ", ".join(header)
                    raise ValueError(f"{where}: not as many fields as the header ({columns}); quote commas in a field")
                yield where, {key: _cell(key, value, where) if value else None for key, value in row.items()}
        except csv.Error as error:
            raise ValueError(f"{file}:{reader.line_num}: not CSV ({error})") from None


def _read_parquet(file: Path) -> Iterator[Placed]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    where = f"{file}:row {number}"
                    yield where, {key: _cell(key, value, where) for key, value in row.items()}
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: not Parquet ({' '.join(str(error).split())[:200]})") from None


def _cell(key: str, value: Any, where: str) -> Any:
    """The value of a table's cell: a list may be written as JSON in it, and one answer is a list of one."""
    if not isinstance(value, str) or key not in ("answers", "messages", "prompt", "completion"):
        return value
    if not re.match(r"\s*\[" if key in ("answers", "messages") else r"\s*\[\s*\{", value):
        return [value] if key == "answers" else value
    try:
        return parse_json(value, strict=True)
    except ValueError as error:
        raise ValueError(f"{where}: key {key!r} is no JSON list ({error}); write one text, or a list") from None


def _read_text(file: Path) -> Iterator[Placed]:
    for where, raw in _raw_lines(file):
        try:
            text = raw.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
        if text:
            yield where, {"text": text}


READERS = {".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet, ".txt": _read_text}
READERS |= {".jsonl": _read_lines, ".json": _read_json}
"""By suffix; a file with another one is read as JSON Lines."""


def _read_dataset(path: str) -> Iterator[Placed]:
    for number, row in enumerate(_load(path), start=1):
        if not any(str(value).strip() for value in row.values() if value is not None):
            continue  # a blank line of a text
        where = f"{path}:row {number}"
        yield where, {key: _cell(key, value, where) for key, value in row.items()}


def _load(path: str) -> Any:
    """The rows of one split of a data set. Raises ValueError."""
    import datasets

    named = data_set(path)
    assert named is not None
    name, split = str(named["name"]), named["split"]
    folder = Path(name)
    try:
        if any((folder / file).is_file() for file in ("dataset_info.json", "dataset_dict.json")):
            found = datasets.load_from_disk(name)
        else:  # a folder is read a row at a time; of the hub it is a mapped file, which is there without a network too
            found = datasets.load_dataset(name, named["config"], streaming=folder.is_dir())
    except Exception as error:  # the library raises many kinds; all mean the same to the user
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(
            f"{path}: no such file, and no data set {name!r} ({reason}); give a file, a folder, or a data set of the "
            "hub as owner/name:split or owner/name:config:split; for a gated one: hf auth login, or HF_TOKEN"
        ) from None
    if not isinstance(found, dict):  # save_to_disk of one split
        return found
    chosen = split or ("train" if "train" in found else next(iter(found)) if len(found) == 1 else "")
    if chosen not in found:
        raise ValueError(
            f"{path}: no data set {name!r} with a split {chosen!r}; it has {', '.join(found)}: {name}:SPLIT"
        )
    return found[chosen]
