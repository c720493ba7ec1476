"""The bytes that each token of a Hugging Face tokenizer stands for, and a text's tokens as the middle of a sequence.

Decoding a single token is lossy: half a character becomes U+FFFD, a leading space goes. Here the bytes come from the
vocabulary itself, read as the tokenizer's own decoder reads it: GPT-2's table of 256 letters (byte-level BPE), or
sentencepiece's `▁` for a space and `<0xC3>` for a byte (BPE with byte fallback, unigram).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from rewards.alignment import ends_of_offsets, ends_of_pieces

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
NOWHERE = "\uffff"
"""A noncharacter: no text has it."""
UNKNOWN = b"\xff"
"""Piece of an id that the tokenizer does not know (models pad their vocabulary): no text, read as U+FFFD."""


@dataclass(frozen=True)
class Encoded:
    """A text in tokens."""

    tokens: tuple[int, ...]
    """Token ids."""
    ends: tuple[int, ...] | None
    """Where each token ends, in bytes of the text; None where that cannot be told."""


def byte_letters() -> dict[str, int]:
    """GPT-2's letter for each byte: printable Latin-1 stands for itself, the others for U+0100 and on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(b): b for b in printable}, **{chr(256 + n): b for n, b in enumerate(others)}}


class TokenBytes:
    """One tokenizer, seen as a way to cut bytes.

    Raises ValueError for a tokenizer whose pieces are neither byte-level nor sentencepiece's (WordPiece, characters).
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        """`name` is the configuration key and value of the model, for errors."""
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        spec = json.loads(backend.to_str()) if backend is not None else None
        steps = [] if spec is None else _kinds(spec["decoder"], "decoders")
        self._letters = byte_letters() if any(step["type"] == "ByteLevel" for step in steps) else None
        sentencepiece = hasattr(tokenizer, "sp_model") if spec is None else any(map(_makes_spaces, steps))
        if self._letters is None and not sentencepiece:
            raise ValueError(
                f"{name}: its tokenizer's pieces are neither byte-level BPE nor sentencepiece's, so the teacher's "
                "log-probabilities cannot be carried between the two tokenizers; take another model"
            )
        self._inner = None if spec is None else _continuation(spec)
        added = tokenizer.added_tokens_decoder
        ids = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        self.symbols: dict[int, str] = {int(i): str(tokenizer.convert_ids_to_tokens(int(i))) for i in ids}
        """Special symbols by id."""
        self._added: dict[int, str] = {int(i): str(token.content) for i, token in added.items()}

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for inside a text; a special symbol's are its name."""
        name = self.symbols.get(token, self._added.get(token))  # what is added is written as it is, `ø` as in text
        if name is not None:
            return name.encode()
        try:
            text = self._tokenizer.convert_ids_to_tokens(token)
        except IndexError:  # sentencepiece, for an id beyond its vocabulary
            return UNKNOWN
        if not isinstance(text, str):
            return UNKNOWN
        if self._letters is not None:
            try:
                return bytes(self._letters[char] for char in text)
            except KeyError:  # no letters of that table
                return text.encode()
        match = BYTE_PIECE.fullmatch(text)
        return bytes([int(match[1], 16)]) if match else text.replace(SPACE, " ").encode()

    def size(self, tokens: Iterable[int]) -> int:
        """Bytes of text in these tokens; special symbols have none."""
        return sum(len(self.piece(token)) for token in tokens if token not in self.symbols)

    def encode(self, text: str) -> Encoded:
        """A text in the middle of a sequence: no symbol and no space is put in front, and a special symbol's name in
        the text is text."""
        if self._inner is not None:
            found = self._inner.encode(text, add_special_tokens=False)
            ids: list[int] = found.ids
        else:
            ids = self._encode_slowly(text)
        ends = ends_of_pieces([self.piece(i) for i in ids], text.encode())
        if ends is None and self._inner is not None:
            # The tokenizer changed the text on the way in, or does not know a character.
            ends = ends_of_offsets([end for _, end in found.offsets], text)
        return Encoded(tuple(ids), None if ends is None else tuple(ends))

    def _encode_slowly(self, text: str) -> list[int]:
        """By the sentencepiece library, which may put a space in front of a text: then the text's own is left to it."""

        def encode(part: str) -> list[int]:
            return list(self._tokenizer.encode(part, add_special_tokens=False, split_special_tokens=True))

        adds_space = self.piece(encode("a")[0]).startswith(b" ")
        return encode(text[1:] if adds_space and text.startswith(" ") else text)


def _kinds(part: dict[str, Any] | None, inside: str) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder of tokenizer.json, sequences opened."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [kind for step in part[inside] for kind in _kinds(step, inside)]
    return [part]


def _makes_spaces(step: dict[str, Any]) -> bool:
    """A step of a decoder that makes spaces of `▁`."""
    if step["type"] == "Metaspace":
        return step.get("replacement", SPACE) == SPACE
    return step["type"] == "Replace" and step["pattern"] == {"String": SPACE} and step["content"] == " "


def _continuation(spec: dict[str, Any]) -> Tokenizer:
    """The same tokenizer for the middle of a sequence: nothing put in front, no symbol, no special symbol parsed."""
    steps = _kinds(spec["pre_tokenizer"], "pretokenizers")
    # Behind a split at white space the `▁` of every word comes from the prefix, so it has to stay.
    splits = any(step["type"] in ("WhitespaceSplit", "Whitespace") for step in steps)
    for step in steps:
        if step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
        elif step["type"] == "Metaspace" and not splits:
            step["prepend_scheme"] = "never"
    model, special = spec["model"], {t["content"] for t in spec["added_tokens"] or [] if t["special"]}
    if model["type"] == "Unigram":
        # Its vocabulary holds the symbols as pieces, which a text that spells their names would be cut into.
        named = [[f"{NOWHERE}{piece}" if piece in special else piece, score] for piece, score in model["vocab"]]
        model = {**model, "vocab": named}
    kept = [step for step in _kinds(spec["normalizer"], "normalizers") if step["type"] != "Prepend"]
    spec = {
        **spec,
        "model": model,
        "added_tokens": [t for t in spec["added_tokens"] or [] if not t["special"] or model["type"] != "Unigram"],
        "normalizer": {"type": "Sequence", "normalizers": kept} if kept else None,
        "post_processor": None, "truncation": None, "padding": None,
    }  # fmt: skip
    inner = Tokenizer.from_str(json.dumps(spec))
    inner.encode_special_tokens = True
    return inner
