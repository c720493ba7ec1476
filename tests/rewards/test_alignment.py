"""Two tokenizers, token for token: by hand, and over random text for every pair of kinds of tokenizers."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from rewards.alignment import Reading, carry, ends_of_offsets, ends_of_pieces, owners, read_bytes, student_token_of
from tests.support.tokenizer_zoo import KINDS, build, byte_level, cuts, faroese, unigram
from training.teacher.token_bytes import TokenBytes, byte_letters
from training.teacher.translation import Translator

END = 10**6
"""The teacher's end symbol in these tests: it is only handed through."""
TEXTS = st.one_of(
    st.text(max_size=40),
    st.text(alphabet="aðøáó ▁<>0x4B\n\u00a0ﬁ²e\u0301🐑\u200d", max_size=20),
    st.integers(0, 10**6).map(lambda seed: next(cuts(faroese(), seed))),
)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenBytes]:
    folder = tmp_path_factory.mktemp("zoo")
    return {kind: TokenBytes(build(kind, folder), kind) for kind in KINDS}


def logprobs(count: int, seed: int) -> list[float]:
    """Log-probabilities between 0 and -20, as float32 would not hold them."""
    dice = random.Random(seed)
    return [-20 * dice.random() for _ in range(count)]


def aligned(student: TokenBytes, teacher: TokenBytes, response: list[int], finished: bool) -> tuple[float, float]:
    """Totals before and after, with everything checked that holds for any response."""
    read = Translator(student, teacher).translate(response, finished=finished, end_token=END)
    scores = logprobs(len(read.tokens), len(response))
    carried = carry(scores, read.student_token, len(response))
    assert len(carried) == len(response)
    assert all(math.isfinite(value) for value in carried)
    assert list(read.student_token) == sorted(read.student_token), "the order is kept"
    assert read.unread == 0 or not finished
    if finished:
        assert read.tokens[-1] == END
        assert read.student_token[-1] == len(response) - 1
    return math.fsum(scores), math.fsum(carried)


def test_a_teacher_token_goes_where_its_last_byte_was_written() -> None:
    # Student: " Tó" "rs" "havn er"; teacher: " Tórs" "hav" "n e" "r". "ó" is two bytes.
    pieces, reading = [" Tó".encode(), b"rs", b"havn er"], read_bytes(" Tórshavn er".encode(), complete=True)
    ends = ends_of_pieces([" Tórs".encode(), b"hav", b"n e", b"r"], reading.text.encode())
    assert ends == [6, 9, 12, 13]
    target = student_token_of(ends, reading, owners(pieces))
    assert target == [1, 2, 2, 2]
    assert carry([-1.0, -2.0, -4.0, -8.0], target, 3) == [0.0, -1.0, -14.0]


def test_a_merge_over_a_student_boundary_goes_to_the_later_token() -> None:
    reading = read_bytes(b"abcd", complete=True)
    assert student_token_of([3, 4], reading, owners([b"ab", b"", b"cd"])) == [2, 2]


def test_bytes_that_are_no_text() -> None:
    # A lone continuation byte in the middle is read as U+FFFD, whose three bytes stand for it.
    reading = read_bytes(b"a\xb0b", complete=False)
    assert (reading.text, reading.origin, reading.unread) == ("a\ufffdb", (0, 1, 1, 1, 2), 0)
    # Two bytes of three: read as one U+FFFD, which belongs to whoever wrote the last of them.
    assert read_bytes(b"a\xe2\x82b", complete=True).origin == (0, 2, 2, 2, 3)
    # The first two bytes of a sheep: cut off they are left out, before an end symbol they are garbage.
    assert read_bytes(b"a\xf0\x9f", complete=False) == Reading("a", (0,), 2)
    assert read_bytes(b"a\xf0\x9f", complete=True).text == "a\ufffd"
    assert read_bytes(b"\xff", complete=False).text == "\ufffd"


@given(st.binary(max_size=30))
@example(b"\xf0\x9f\xf0\x9f\x90\x91\xed\xa0\x80\xc3")
def test_bytes_are_read_as_pythons_decoder_reads_them(data: bytes) -> None:
    reading = read_bytes(data, complete=True)
    assert reading.text == data.decode(errors="replace")
    assert len(reading.origin) == len(reading.text.encode())
    assert list(reading.origin) == sorted(reading.origin)
    cut = read_bytes(data, complete=False)
    assert cut.text == (data[: len(data) - cut.unread] if cut.unread else data).decode(errors="replace")
    assert cut.unread <= 3


def test_a_space_in_front_and_changed_text() -> None:
    assert ends_of_pieces([b"", b" T", b"x"], b"Tx") == [0, 1, 2]
    assert ends_of_pieces([b"T"], b"Tx") is None
    # Characters to bytes; positions that go back (reordered marks) do not.
    assert ends_of_offsets([1, 3, 2, 4], "aðø") == [1, 5, 5, 5]


def test_the_table_of_letters_is_gpt2s() -> None:
    letters = byte_letters()
    assert len(letters) == 256
    assert sorted(letters.values()) == list(range(256))
    assert [letters[c] for c in "AĠĊÃ°"] == [0x41, 0x20, 0x0A, 0xC3, 0xB0]


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_spell_the_text(zoo: dict[str, TokenBytes], kind: str) -> None:
    for text in ["Tórshavn", " Tórshavn er ein býur.", " í 1957\nog  so — 12,5"]:
        encoded = zoo[kind].encode(text)
        spelled = b"".join(zoo[kind].piece(t) for t in encoded.tokens)
        unknown = b"\n" in text.encode() and kind.startswith("unigram")
        added = b" " if kind == "sentencepiece" and not text.startswith(" ") else b""
        assert unknown or spelled == added + text.encode()
        assert encoded.ends is not None
        assert encoded.ends[-1] == len(text.encode())


@pytest.mark.parametrize(("student", "teacher"), list(itertools.product(KINDS, KINDS)))
@settings(max_examples=12)
@given(text=TEXTS, finished=st.booleans(), drop=st.integers(0, 3))
def test_the_total_is_preserved(
    zoo: dict[str, TokenBytes], student: str, teacher: str, text: str, finished: bool, drop: int
) -> None:
    ids = list(zoo[student].encode(text).tokens)
    ids = ids[: len(ids) - drop]  # may cut a character
    before, after = aligned(zoo[student], zoo[teacher], [*ids, END - 1] if finished else ids, finished)
    assert after == pytest.approx(before, abs=1e-9)


@pytest.mark.parametrize(("student", "teacher"), list(itertools.product(KINDS, KINDS)))
@settings(max_examples=8)
@given(seed=st.integers(0, 10**9), finished=st.booleans(), length=st.integers(1, 12))
def test_the_total_of_random_tokens_is_preserved(
    zoo: dict[str, TokenBytes], student: str, teacher: str, seed: int, finished: bool, length: int
) -> None:
    """Any ids, as a bad student samples them: halves of characters, symbols, ids beyond the vocabulary."""
    dice = random.Random(seed)
    ids = [dice.randrange(905) for _ in range(length)]
    before, after = aligned(zoo[student], zoo[teacher], ids, finished)
    assert after == pytest.approx(before, abs=1e-9)


@pytest.mark.parametrize("kind", ["byte_level", "gemma"])
def test_bytes_are_counted_wherever_a_stretch_is_cut(zoo: dict[str, TokenBytes], kind: str) -> None:
    text = "Tórshavn 🐑 ólavsøka"
    tokens = zoo[kind].encode(text).tokens
    for cut in range(len(tokens) + 1):
        assert zoo[kind].size(tokens[:cut]) + zoo[kind].size(tokens[cut:]) == len(text.encode())
    assert zoo[kind].size(zoo[kind].symbols) == 0


def test_a_token_that_was_added_is_written_as_it_is() -> None:
    """`ø` is also the letter that byte-level BPE has for the byte 0xF8."""
    tokenizer = byte_level()
    tokenizer.add_tokens(["føroyar"])
    pieces = TokenBytes(tokenizer, "s")
    tokens = tokenizer("Havn føroyar", add_special_tokens=False)["input_ids"]
    assert b"".join(map(pieces.piece, tokens)).decode() == "Havn føroyar"
    read = Translator(pieces, TokenBytes(unigram(), "t")).translate(tokens, finished=False, end_token=END)
    assert read.student_token[-1] == len(tokens) - 1


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(text=TEXTS)
def test_equal_tokenizers_give_the_identity(zoo: dict[str, TokenBytes], kind: str, text: str) -> None:
    if kind in ("sentencepiece", "unigram", "unigram_nfkc"):
        # Where the text is changed or unknown, its tokens are no fixed point: only known text here.
        text = next(cuts(faroese()[:10], len(text) + sum(map(ord, text))))
    tokens = zoo[kind]
    ids = list(tokens.encode(text).tokens)
    if tokens.encode(b"".join(map(tokens.piece, ids)).decode()).tokens != tuple(ids):
        return  # sentencepiece reads a literal ▁ as a space
    read = Translator(tokens, tokens).translate([*ids, 0], finished=True, end_token=0)
    assert read.tokens == (*ids, 0)
    assert read.student_token == tuple(range(len(ids) + 1))


def test_symbols_inside_a_response() -> None:
    student, teacher = TokenBytes(byte_level(), "s"), TokenBytes(unigram(end="<|im_start|>"), "t")
    other = TokenBytes(unigram(), "t")
    symbol = next(t for t, name in student.symbols.items() if name == "<|im_start|>")
    a, b = student.encode(" Havn").tokens, student.encode(" Føroya").tokens
    response = [*a, symbol, *b]
    shared = Translator(student, teacher).translate(response, finished=False, end_token=END)
    same = next(t for t, name in teacher.symbols.items() if name == "<|im_start|>")
    assert shared.tokens == (*teacher.encode(" Havn").tokens, same, *teacher.encode(" Føroya").tokens)
    assert shared.student_token[shared.tokens.index(same)] == len(a)
    # A teacher without that symbol reads its name, and a name that the student spells is no symbol.
    named = Translator(student, other).translate(response, finished=False, end_token=END)
    assert named.tokens == other.encode(" Havn<|im_start|> Føroya").tokens
    spelled = Translator(student, other).translate(student.encode("a</s>").tokens, finished=False, end_token=END)
    assert not set(spelled.tokens) & {t for t, name in other.symbols.items() if name == "</s>"}


def test_a_cut_character_is_counted_and_garbage_is_read() -> None:
    student, teacher = TokenBytes(byte_level(), "s"), TokenBytes(unigram(), "t")
    ids = list(student.encode(" Havn 🐑").tokens)[:-2]  # half a sheep: two tokens of a byte each
    read = Translator(student, teacher).translate(ids, finished=False, end_token=END)
    assert read.unread == 2
    assert read.tokens == teacher.encode(" Havn ").tokens
    carried = carry([-1.0] * len(read.tokens), read.student_token, len(ids))
    assert carried[-2:] == [0.0, 0.0]
    ended = Translator(student, teacher).translate([*ids, 0], finished=True, end_token=END)
    assert ended.unread == 0
    assert ended.tokens == (*teacher.encode(" Havn \ufffd").tokens, END)


def test_no_credit_comes_before_the_last_byte(zoo: dict[str, TokenBytes]) -> None:
    """What a prefix has collected is the score of whole teacher tokens inside it: nothing from behind it."""
    student, teacher = zoo["byte_level_digits"], zoo["llama"]
    for text in itertools.islice(cuts(faroese(), 7), 50):
        ids = list(student.encode(text).tokens)
        read = Translator(student, teacher).translate(ids, finished=False, end_token=END)
        written = list(itertools.accumulate(len(student.piece(t)) for t in ids))
        ends = teacher.encode(text).ends
        assert ends is not None
        for target, end in zip(read.student_token, ends, strict=True):
            assert end <= written[target]
            assert target == 0 or end > written[target - 1]


def test_pieces_that_are_no_bytes_are_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models

    inner = Tokenizer(models.WordPiece({"[UNK]": 0, "##a": 1}, unk_token="[UNK]"))
    inner.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match=r"teacher.path = 'x': its tokenizer's pieces are neither byte-level"):
        TokenBytes(PreTrainedTokenizerFast(tokenizer_object=inner), "teacher.path = 'x'")
