"""From Faroese sentences the files of an experiment: raw text, prompts that are its openings, and held-out sentences.

    python eval/experiments/openings.py SENTENCES.jsonl FOLDER [--heldout 100] [--words 3] [--seed 0]

Writes text.jsonl and heldout.jsonl (sentences), prompts.jsonl and questions.jsonl (their first words as `question`, the
rest as the answer; of the text and of the held-out sentences). A held-out sentence is in no file of training.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started as a script: our folders first, and no file of this folder hides a library
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from configs.io.files import write_atomically
from configs.io.jsonl import read_texts
from eval.cli import exit_code, parser_of


def split(sentences: Sequence[str], heldout: int, seed: int) -> tuple[list[str], list[str]]:
    """(training sentences, held-out ones): repeated sentences left out, the held-out ones drawn by seed.

    Raises ValueError where as many sentences are to be held out as there are.
    """
    unique = list(dict.fromkeys(" ".join(sentence.split()) for sentence in sentences))
    if heldout >= len(unique):
        raise ValueError(f"--heldout {heldout}: the text has {len(unique)} sentences; give more text, or hold out less")
    chosen = set(random.Random(seed).sample(range(len(unique)), heldout))
    return (
        [sentence for i, sentence in enumerate(unique) if i not in chosen],
        [sentence for i, sentence in enumerate(unique) if i in chosen],
    )


def openings(sentences: Sequence[str], words: int) -> list[dict[str, Any]]:
    """The first words of each sentence that has more as a question, the rest as its answer."""
    cut = [sentence.split() for sentence in sentences]
    return [{"question": " ".join(c[:words]), "answers": [" ".join(c[words:])]} for c in cut if len(c) > words]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line that says what to mend."""
    parser = parser_of(__doc__, runs_dir=False)
    parser.add_argument("sentences", type=Path, help="JSONL with `text`, or one in each line")
    parser.add_argument("folder", type=Path, help="where the four files go")
    parser.add_argument("--heldout", type=int, default=100, help="sentences kept out of training (100)")
    parser.add_argument("--words", type=int, default=3, help="first words of a sentence that make a prompt (3)")
    parser.add_argument("--seed", type=int, default=0, help="of the split (0)")
    options = parser.parse_args(arguments)
    return exit_code(lambda: write_files(options))


def write_files(options: argparse.Namespace) -> None:
    """The four files. Raises ValueError."""
    train, heldout = split(read_texts(options.sentences), options.heldout, options.seed)
    files: dict[str, list[dict[str, Any]]] = {
        "text": [{"text": sentence} for sentence in train],
        "heldout": [{"text": sentence} for sentence in heldout],
        "questions": openings(heldout, options.words),
        "prompts": openings(train, options.words),
    }
    for name, rows in files.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(options.folder / f"{name}.jsonl", lines)


if __name__ == "__main__":
    sys.exit(main())
