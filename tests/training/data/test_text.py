"""Raw text as blocks: nothing lost, nothing twice, whoever reads it, from wherever the run goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.prompts import Format
from configs.schema import DataConfig
from inference.attention.packing import Group, pack_row
from training.data import text as text_module
from training.data.order import positions_of_step, share_of_rank
from training.data.text import TextBlocks, flat, text_blocks

END = 0


class Words:
    """A tokenizer: each number in the text is a token."""

    read = 0

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        self.read += 1
        return {"input_ids": [int(word) for word in text.split()]}

    def get_vocab(self) -> dict[str, int]:
        return {}

    eos_token_id, added_tokens_decoder, all_special_tokens = None, {}, ()  # type: ignore[var-annotated]


def blocks_of(rows: list[list[int]], block: int, *, documents: bool) -> TextBlocks:
    tokens = np.array([token for row in rows for token in (*row, END)], dtype=np.uint32)
    return TextBlocks(tokens, block, END, documents=documents)


rows = st.lists(st.lists(st.integers(1, 9), max_size=7), min_size=1, max_size=12)


@given(rows, st.integers(2, 9))
def test_every_token_is_predicted_once_but_for_the_first_of_a_block(texts: list[list[int]], block: int) -> None:
    stream = [token for row in texts for token in (*row, END)]
    expected = [t for i in range(0, len(stream), block) for t in stream[i + 1 : i + block]]
    for documents in (False, True):
        groups = flat(blocks_of(texts, block, documents=documents))
        assert [t for group in groups for t in group.responses[0]] == expected


@given(rows, st.integers(2, 9))
def test_with_documents_a_token_sees_its_own_row_only(texts: list[list[int]], block: int) -> None:
    """Each token's context is what stands before it in its row and its block; the end of the row before opens it."""
    stream = [token for row in texts for token in (*row, END)]
    expected = []
    for first in range(0, len(stream), block):
        piece = stream[first : first + block]
        for place in range(1, len(piece)):
            ends = [i for i in range(place) if piece[i] == END]
            expected.append((tuple(piece[ends[-1] if ends else 0 : place]), piece[place]))
    groups = flat(blocks_of(texts, block, documents=True))
    found = [
        ((*group.prompt, *group.responses[0][:t]), token)
        for group in groups
        for t, token in enumerate(group.responses[0])
    ]
    assert found == expected


@settings(max_examples=40)
@given(st.integers(2, 60), st.integers(1, 7), st.integers(1, 3), st.integers(0, 9), st.integers(0, 30))
def test_an_epoch_has_every_block_once_and_a_resumed_run_goes_on_with_it(
    size: int, count: int, world: int, seed: int, resumed: int
) -> None:
    tokens = np.arange(1, 2 * size + 1, dtype=np.uint32)

    def step(number: int) -> list[tuple[Group, ...]]:
        blocks = TextBlocks(tokens, 2, END)  # opened anew, as after a restart
        chosen = positions_of_step(number, count, len(blocks), seed)
        shares = [share_of_rank(chosen, rank, world) for rank in range(world)]
        assert sum(map(len, shares)) == count  # ranks are disjoint and leave nothing
        return [blocks[i] for share in shares for i in share]

    steps = -(-2 * size // count)
    unbroken = [step(number) for number in range(steps)]
    assert [step(number) for number in range(min(resumed, steps), steps)] == unbroken[min(resumed, steps) :]
    read = [group.prompt[0] for blocks in unbroken for (group,) in blocks]
    for epoch in range(2):
        assert sorted(read[epoch * size : (epoch + 1) * size]) == list(range(1, 2 * size, 2))


def write(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def test_the_text_is_read_once_and_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "FLUSH", 4)  # written in several pieces
    file, words = write(tmp_path / "text.jsonl", ["1 2 3", "4 5 6 7 8", "4  5 6 7 8", "9"]), Words()
    data = DataConfig(text=str(file), text_block_tokens=4)
    blocks = text_blocks(data, Format(words, model_ends=(END,)), tmp_path)
    assert words.read == 4
    assert isinstance(blocks._tokens, np.memmap)
    assert [(g.prompt, g.responses) for g in flat(blocks)] == [
        ((1,), ((2, 3, 0),)), ((4,), ((5, 6, 7),)), ((8,), ((0, 4, 5),)), ((6,), ((7, 8, 0),)), ((9,), ((0,),)),
    ]  # fmt: skip
    assert list(text_blocks(data, Format(words, model_ends=(END,)), tmp_path)) == list(blocks)
    assert words.read == 4
    once = replace(data, text_block_tokens=5, deduplicate=True)
    unique = text_blocks(once, Format(words, model_ends=(END,)), tmp_path)
    assert [g.prompt + g.responses[0] for g in flat(unique)] == [(1, 2, 3, 0, 4), (5, 6, 7, 8, 0), (9, 0)]
    write(file, ["1 2 3 4"])  # another file of the same name is read anew
    assert (
        len(text_blocks(data, Format(words, model_ends=(END,)), tmp_path)) == 1
    )  # 5 tokens; the fifth alone predicts nothing
    assert list(blocks.picked(np.array([3, 0]))) == [blocks[3], blocks[0]]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    data = DataConfig(text=str(write(tmp_path / "text.jsonl", ["1", " "])))
    with pytest.raises(ValueError, match=r"text.jsonl:2: key 'text' is empty"):
        text_blocks(data, Format(Words(), model_ends=(END,)), tmp_path)
    assert not list((tmp_path / "text").glob("*.tokens"))

    class Nothing(Words):
        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": []}

    write(tmp_path / "text.jsonl", ["1"])
    with pytest.raises(ValueError, match="not two tokens of text"):
        text_blocks(data, Format(Nothing(), model_ends=(END,)), tmp_path)


def test_documents_are_packed_without_padding() -> None:
    blocks = blocks_of([[1, 2], [3], [4, 5, 6]], 9, documents=True)
    row = pack_row(flat(blocks))
    assert row.tokens_T.tolist() == [1, 2, 0, 3, 0, 4, 5, 6]  # 8 places predict 8 tokens
    assert row.positions_T.tolist() == [0, 1, 0, 1, 0, 1, 2, 3]
    assert row.labels_S.tolist() == [2, 0, 3, 0, 4, 5, 6, 0]
