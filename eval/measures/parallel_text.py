"""Sentences in several languages, from FLORES-200 or files of one's own.

    facebook/flores, openlanguagedata/flores_plus    hub ids: a configuration for each language (fao_Latn), splits dev
                                                     and devtest (both ask for consent: log in first)
    flores200_dataset/                               a folder as FLORES-200 is packed: devtest/fao_Latn.devtest
    sentences.jsonl, .csv, .tsv, .parquet            a column for each language: {"fao": ..., "eng": ..., "dan": ...}

Sentences with the same number say the same thing. FLORES asks that its text is not put onto the web in the clear.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from configs.io.jsonl import read_jsonl

NAMES = {"fao": "Faroese", "eng": "English", "dan": "Danish", "isl": "Icelandic", "nob": "Norwegian", "swe": "Swedish"}
HUB_TIMEOUT_S = "5"
"""Seconds that the hub may take to answer at all."""


@dataclass(frozen=True, kw_only=True)
class ParallelText:
    """The same sentences in several languages."""

    source: str
    """`hub` or `local`."""
    name: str
    """Hub id with split, or path."""
    sentences: dict[str, list[str]]
    """By language; equally many."""
    revision: str | None = None
    """Of the hub's data set."""

    def digest(self, languages: Sequence[str]) -> str:
        """SHA-256 of the sentences of these languages."""
        text = "\0".join("\n".join(self.sentences[language]) for language in languages)
        return hashlib.sha256(text.encode()).hexdigest()

    def first(self, count: int | None) -> ParallelText:
        """The first sentences; None: all."""
        return replace(self, sentences={language: lines[:count] for language, lines in self.sentences.items()})


def load_parallel(data: str, languages: Sequence[str], split: str) -> ParallelText:
    """Raises ValueError, naming file and line, where a language is missing or sentences do not match up."""
    for language in languages:
        if language not in NAMES:
            raise ValueError(f"language {language!r}: unknown; there are {', '.join(NAMES)}")
    path = Path(data)
    if path.is_dir():
        found = {language: _flores_file(path, f"{language}_Latn", split) for language in languages}
        return _checked(ParallelText(source="local", name=f"{path} ({split})", sentences=found))
    if path.suffix in (".jsonl", ".csv", ".tsv", ".parquet"):
        rows = read_jsonl(path, list(languages))
        found = {language: [" ".join(str(row[language]).split()) for row in rows] for language in languages}
        return _checked(ParallelText(source="local", name=str(path), sentences=found))
    if data.count("/") == 1 and not data.startswith((".", "/", "~")):
        return _checked(_from_hub(data, languages, split))
    raise ValueError(
        f"--data {data}: no such folder or file; give a hub id (facebook/flores), FLORES-200's folder, or a .jsonl or "
        ".csv file with a column for each language"
    )


def _flores_file(folder: Path, code: str, split: str) -> list[str]:
    file = folder / split / f"{code}.{split}"
    if not file.is_file():
        raise ValueError(f"{file}: no such file; a FLORES-200 folder has {split}/{code}.{split}, a sentence a line")
    lines = file.read_text(encoding="utf-8").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise ValueError(f"{file}:{number}: an empty line; each line is one sentence of all languages")
    return [line.strip() for line in lines]


def _from_hub(name: str, languages: Sequence[str], split: str) -> ParallelText:
    # Set before the import: a machine without a network is told so in seconds, not in minutes.
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", HUB_TIMEOUT_S)
    import datasets
    from huggingface_hub import HfApi

    found: dict[str, list[str]] = {}
    try:
        revision = HfApi().dataset_info(name, timeout=float(HUB_TIMEOUT_S)).sha
        for language in languages:
            rows: Any = datasets.load_dataset(name, f"{language}_Latn", split=split, revision=revision)
            column = "text" if "text" in rows.column_names else "sentence"
            found[language] = [" ".join(str(text).split()) for text in rows[column]]
    except Exception as error:  # the hub's clients raise many kinds; all mean the same to the user
        reason = " ".join(str(error).split())[:160]
        raise ValueError(
            f"--data {name}: the hub did not give it ({type(error).__name__}: {reason}); log in where it asks for "
            "consent, or give FLORES-200's folder or a .jsonl or .csv file"
        ) from None
    return ParallelText(source="hub", name=f"{name}:{split}", sentences=found, revision=revision)


def _checked(text: ParallelText) -> ParallelText:
    counts = {language: len(lines) for language, lines in text.sentences.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise ValueError(f"{text.name}: {counts} sentences; each language needs the same ones")
    return text
