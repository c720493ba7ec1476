"""Sentences in several languages, from FLORES-200 or files of one's own.

    facebook/flores, openlanguagedata/flores_plus    hub ids: a configuration for each language (fao_Latn), splits dev
                                                     and devtest (both ask for consent: log in first)
    flores200_dataset/                               a folder as FLORES-200 is packed: devtest/fao_Latn.devtest
    sentences.jsonl, .csv, .tsv, .parquet            a column for each language: {"fao": ..., "eng": ..., "dan": ...}

Sentences with the same number say the same thing. FLORES asks that its text is not put onto the web in the clear.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from configs.io.jsonl import read_jsonl, read_texts

NAMES = {"fao": "Faroese", "eng": "English", "dan": "Danish"}


@dataclass(frozen=True, kw_only=True)
class ParallelText:
    """The same sentences in several languages."""

    name: str
    """Where they are from, and which split."""
    sentences: dict[str, list[str]]
    """By language; equally many."""

    def digest(self, languages: Sequence[str]) -> str:
        """SHA-256 of the sentences of these languages."""
        text = "\0".join("\n".join(self.sentences[language]) for language in languages)
        return hashlib.sha256(text.encode()).hexdigest()

    def first(self, count: int | None) -> ParallelText:
        """The first sentences; None: all."""
        return replace(self, sentences={language: lines[:count] for language, lines in self.sentences.items()})


def load_parallel(data: str, languages: Sequence[str], split: str) -> ParallelText:
    """Raises ValueError, naming file and line, where a language is missing or sentences do not match up."""
    path = Path(data)
    if path.is_file():
        rows = read_jsonl(path, list(languages))
        name, found = data, {language: [str(row[language]) for row in rows] for language in languages}
    elif path.is_dir():
        name = f"{path} ({split})"
        found = {language: _flores_file(path / split / f"{language}_Latn.{split}") for language in languages}
    else:
        name = f"{data}:{split}"
        found = {language: _from_hub(f"{data}:{language}_Latn:{split}") for language in languages}
    counts = {language: len(lines) for language, lines in found.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"{name}: {counts} sentences; each language needs the same ones")
    return ParallelText(
        name=name, sentences={language: [" ".join(line.split()) for line in lines] for language, lines in found.items()}
    )


def _flores_file(file: Path) -> list[str]:
    if not file.is_file():
        raise ValueError(f"{file}: no such file; a FLORES-200 folder has it, a sentence a line")
    return read_texts(file)


def _from_hub(name: str) -> list[str]:
    return [row.get("text") or row["sentence"] for row in read_jsonl(name)]
