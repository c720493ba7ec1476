"""Raw text for L_PT, which need not fit into memory: its tokens are a file, and a block is a place in it.

The text is read and tokenised once, row by row, into `cache_dir/text/KEY.tokens` (4 bytes a token), which is mapped,
not loaded. Rows stand end to end, each with the end symbol behind it, and are cut into blocks without padding. Which
blocks a step takes is a pure function of (seed, step) (`data.positions_of_step`), so there is no cursor to save: a
resumed run reads what an unbroken one reads, no block is lost or read twice in an epoch, and ranks share a step's
blocks out.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import os
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np

from configs.jsonl import iterate_jsonl
from inference.packing import Group
from training.overlap import folded

FLUSH = 1 << 20
"""Tokens that are held before they are written."""
Item = TypeVar("Item")


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
        self._count = len(tokens) // block + (len(tokens) % block > 1)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> tuple[Group, ...]: ...
    @overload
    def __getitem__(self, place: slice) -> list[tuple[Group, ...]]: ...
    def __getitem__(self, place: int | slice) -> tuple[Group, ...] | list[tuple[Group, ...]]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if not 0 <= place < self._count:
            raise IndexError(place)
        tokens = self._tokens[place * self._block : (place + 1) * self._block].tolist()
        ends = [i for i, token in enumerate(tokens[:-1]) if token == self._end_token] if self._documents else []
        borders = [*dict.fromkeys([0, *ends]), len(tokens) - 1]
        return tuple(
            Group(prompt=(tokens[first],), responses=(tuple(tokens[first + 1 : last + 1]),))
            for first, last in itertools.pairwise(borders)
        )


class Picked(Sequence[Item]):
    """Some items of a sequence, which are read when they are asked for."""

    def __init__(self, items: Sequence[Item], places: np.ndarray) -> None:
        self._items = items
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> Item: ...
    @overload
    def __getitem__(self, place: slice) -> list[Item]: ...
    def __getitem__(self, place: int | slice) -> Item | list[Item]:
        if isinstance(place, slice):
            return [self._items[int(i)] for i in self._places[place]]
        return self._items[int(self._places[place])]


def flat(blocks: Sequence[Sequence[Group]]) -> list[Group]:
    """The groups of some blocks, for the packer."""
    return [group for block in blocks for group in block]


def text_blocks(
    path: str | Path, tokenizer: Any, end_token: int, block: int, *, cache: str | Path, deduplicate: bool = False,
    documents: bool = False,
) -> TextBlocks:  # fmt: skip
    """The blocks of a file of raw text; its tokens are in the folder `cache` from then on. `deduplicate`: without rows
    that occurred before (8 bytes a row are held while it is read). Processes that start together read it once.

    Raises ValueError for a malformed file, and where there are not two tokens of text.
    """
    folder = Path(cache) / "text"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{_key(path, tokenizer, end_token, deduplicate)}.tokens"
    if not file.is_file():
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.is_file():
                _write(file, _tokens(path, tokenizer, end_token, deduplicate))
    if file.stat().st_size < 2 * 4:
        raise ValueError(f"data.text = {str(path)!r}: not two tokens of text in the file; give it some text")
    return TextBlocks(np.memmap(file, dtype=np.uint32, mode="r"), block, end_token, documents=documents)


def _tokens(path: str | Path, tokenizer: Any, end_token: int, deduplicate: bool) -> Iterator[list[int]]:
    """The tokens of each row, its end symbol last."""
    seen: set[bytes] = set()
    for row in iterate_jsonl(path, ["text"]):
        if deduplicate:
            key = hashlib.blake2b(folded(row["text"]).encode(), digest_size=8).digest()
            if key in seen:
                continue
            seen.add(key)
        yield [*tokenizer(row["text"], add_special_tokens=False)["input_ids"], end_token]


def _write(file: Path, rows: Iterator[list[int]]) -> None:
    """All rows end to end, beside and renamed."""
    handle, beside = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            held = array("I")
            for row in rows:
                held.extend(row)
                if len(held) >= FLUSH:
                    held.tofile(out)
                    held = array("I")
            held.tofile(out)
            out.flush()
            os.fsync(out.fileno())
        os.replace(beside, file)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def _key(path: str | Path, tokenizer: Any, end_token: int, deduplicate: bool) -> str:
    """What the tokens depend on: the file (its place, size and time; of a data set the name), and the tokenizer."""
    found = Path(path)
    state = (found.stat().st_size, found.stat().st_mtime_ns) if found.is_file() else ()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pieces = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    parts = (str(found.resolve() if found.exists() else path), state, end_token, deduplicate, pieces)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]
