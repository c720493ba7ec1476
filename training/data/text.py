"""Raw text for L_PT, which need not fit into memory: its tokens are a file, and a block is a place in it.

The text is read and tokenised once, row by row, into `cache_dir/text/KEY.tokens` (4 bytes a token), which is mapped,
not loaded. Rows stand end to end, each with the end symbol behind it, and are cut into blocks without padding. Which
blocks a step takes is a pure function of (seed, step) (training/data/order.py), so there is no cursor to save: a
resumed run reads what an unbroken one reads, no block is lost or read twice in an epoch, and ranks share a step's
blocks out.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from configs.io.files import locked, write_atomically
from configs.io.jsonl import iterate_jsonl
from configs.io.tables import content
from configs.prompts import Format
from configs.schema import DataConfig
from inference.attention.packing import Group
from training.data.overlap import folded

FLUSH = 1 << 20
"""Tokens that are held before they are written."""


class TextBlocks(Sequence[tuple[Group, ...]]):
    """Blocks of a stream of tokens; each is the groups that the student is trained on.

    A block of n tokens predicts n - 1 of them. Whole (`documents` off) it is one group, whose first token is context
    and in which a row sees the rows before it. With `documents` each row's part is a group of its own, which begins
    with the end symbol of the row before: the same tokens are predicted, none from another row.
    """

    def __init__(self, tokens: np.ndarray, block: int, end_token: int, *, documents: bool = False) -> None:
        self._tokens = tokens
        self._block = block
        self._end_token = end_token
        self._documents = documents
        # A last block of a single token predicts nothing.
        self._places = np.arange(len(tokens) // block + (len(tokens) % block > 1))

    def picked(self, chosen: np.ndarray) -> TextBlocks:
        """Some of the blocks, by their places or a mask."""
        blocks = copy.copy(self)
        blocks._places = self._places[chosen]
        return blocks

    @property
    def highest(self) -> int:
        """The highest token of the whole text."""
        return int(self._tokens.max())

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: int) -> tuple[Group, ...]:  # type: ignore[override]  # no slices
        first = int(self._places[place]) * self._block  # IndexError behind the last one
        tokens = self._tokens[first : first + self._block].tolist()
        ends = [i for i, token in enumerate(tokens[:-1]) if token == self._end_token] if self._documents else []
        borders = [*dict.fromkeys([0, *ends]), len(tokens) - 1]
        return tuple(
            Group(prompt=(tokens[first],), responses=(tuple(tokens[first + 1 : last + 1]),))
            for first, last in itertools.pairwise(borders)
        )


def flat(blocks: Sequence[Sequence[Group]]) -> list[Group]:
    """The groups of some blocks, for the packer."""
    return [group for block in blocks for group in block]


def text_blocks(data: DataConfig, asked: Format, cache: str | Path) -> TextBlocks:
    """The blocks of data.text, whose path is resolved by now; its tokens are in the folder `cache` from then on. With
    data.deduplicate 8 bytes a row are held while it is read. Processes that start together read it once.

    Raises ValueError for a malformed file, and where there are not two tokens of text.
    """
    path, documents = str(data.text), data.text_packing == "documents"
    folder = Path(cache) / "text"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{_key(path, asked, data.deduplicate)}.tokens"
    if not file.is_file():
        with locked(folder / ".lock"):
            if not file.is_file():
                write_atomically(file, _pieces(_tokens(path, asked, data.deduplicate)))
    if file.stat().st_size < 2 * 4:
        raise ValueError(f"data.text = {path!r}: not two tokens of text in the file; give it some text")
    tokens = np.memmap(file, dtype=np.uint32, mode="r")
    return TextBlocks(tokens, data.text_block_tokens, asked.end_of_text, documents=documents)


def _tokens(path: str, asked: Format, deduplicate: bool) -> Iterator[list[int]]:
    """The tokens of each row, its end symbol last."""
    seen: set[bytes] = set()
    for row in iterate_jsonl(path, ["text"]):
        if deduplicate:
            key = hashlib.blake2b(folded(row["text"]).encode(), digest_size=8).digest()
            if key in seen:
                continue
            seen.add(key)
        yield [*asked.text(row["text"]), asked.end_of_text]


def _pieces(rows: Iterator[list[int]]) -> Iterator[bytes]:
    """All rows end to end, 4 bytes a token."""
    held = array("I")
    for row in rows:
        held.extend(row)
        if len(held) >= FLUSH:
            yield held.tobytes()
            held = array("I")
    yield held.tobytes()


def _key(path: str, asked: Format, deduplicate: bool) -> str:
    """What the tokens depend on: what is in the file, folder or data set, which part of it is read, the tokenizer."""
    backend = getattr(asked.tokenizer, "backend_tokenizer", None)
    pieces = backend.to_str() if backend is not None else sorted(asked.tokenizer.get_vocab().items())
    parts = (path, content(path), asked.end_of_text, deduplicate, pieces)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]
