"""New pieces for a tokenizer, learned on top of its own: byte-level BPE, sentencepiece's BPE and unigram.

Every new piece is a merge of two pieces, and all new merges come after the old ones. A text is therefore first cut as
it always was, and only then are neighbours joined: a new piece stands for one sequence of old pieces, which is what
its embedding is made of (training/tools/tokenizer_rows.py).
"""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, models, trainers

PRIVATE = 0xF0000
"""First code point of a private plane of Unicode: one character stands for one old piece while merges are learned."""
WORD_MARKS = ("▁", "Ġ")
"""How sentencepiece and byte-level BPE write the space before a word."""


@dataclass(frozen=True)
class NewPiece:
    """One new entry of the vocabulary."""

    text: str
    """As the vocabulary writes it."""
    parts: tuple[int, ...]
    """Ids of the old pieces that it stands for."""
    count: int
    """Occurrences in the corpus."""


@dataclass(frozen=True)
class Extension:
    """What a corpus adds to a tokenizer."""

    pieces: list[NewPiece]
    """Letters that were bytes or unknown first, then merges; their ids follow the old ones in this order."""
    merges: list[tuple[str, str]]
    """In order, to stand behind the old merges (BPE)."""
    first_id: int
    """Id of the first of them."""
    tokens: int
    """Tokens of the corpus before."""


def learn(content: dict[str, Any], texts: Sequence[str], count: int) -> Extension:
    """Up to `count` pieces for `texts`. `content`: the old tokenizer.json.

    Raises ValueError for another kind of tokenizer, and where the texts hold nothing that is worth a piece.
    """
    kind = content["model"].get("type")
    if kind not in ("BPE", "Unigram"):
        raise ValueError(f"the tokenizer is a {kind} model; pieces can be added to BPE and unigram models")
    vocabulary = vocabulary_of(content)
    first_id = max([*vocabulary.values(), *(token["id"] for token in content["added_tokens"])]) + 1
    letters = _missing_letters(content, vocabulary, texts)[:count]
    known = vocabulary | {piece.text: first_id + i for i, piece in enumerate(letters)}
    tokens = max(sum(len(one.ids) for one in Tokenizer.from_str(json.dumps(content)).encode_batch(list(texts))), 1)
    with_letters = extended(content, Extension(letters, [], first_id, tokens))
    words = Counter(_words(with_letters, texts))
    parts = {first_id + i: piece.parts for i, piece in enumerate(letters)}
    pieces, merges = _merges(words, known, parts, count - len(letters))
    if not letters and not pieces:
        raise ValueError("the texts hold no two pieces of a word that occur together twice; give more text")
    return Extension([*letters, *pieces], merges, first_id, tokens)


def extended(content: dict[str, Any], extension: Extension) -> dict[str, Any]:
    """tokenizer.json with the new pieces."""
    new = copy.deepcopy(content)
    model = new["model"]
    ids = {piece.text: extension.first_id + i for i, piece in enumerate(extension.pieces)}
    if model["type"] == "BPE":
        model["vocab"] |= ids
        as_text = bool(model["merges"]) and isinstance(model["merges"][0], str)
        model["merges"] += [" ".join(pair) if as_text else list(pair) for pair in extension.merges]
        return new
    # A unigram's ids are places in its list: special tokens that stand behind it get their places first.
    scores = [score for _, score in model["vocab"]]
    by_id = {token["id"]: token["content"] for token in new["added_tokens"]}
    model["vocab"] += [[by_id[i], 0.0] for i in range(len(scores), extension.first_id)]
    lowest = min(scores)
    for piece in extension.pieces:
        together = sum(scores[part] if part < len(scores) else lowest for part in piece.parts)
        # Likelier than its parts together, or the best cut would never use it.
        model["vocab"].append([piece.text, max(math.log(piece.count / extension.tokens), together + 0.1)])
    return new


def vocabulary_of(content: dict[str, Any]) -> dict[str, int]:
    """Piece -> id of the model inside a tokenizer.json (no added tokens)."""
    vocab = content["model"]["vocab"]
    return dict(vocab) if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}


def is_byte_level(content: dict[str, Any]) -> bool:
    """Whether the pieces are written in GPT-2's alphabet of bytes."""
    return '"ByteLevel"' in json.dumps(content.get("pre_tokenizer")) + json.dumps(content.get("decoder"))


def _missing_letters(content: dict[str, Any], vocabulary: dict[str, int], texts: Sequence[str]) -> list[NewPiece]:
    """Letters that occur at least twice and that the tokenizer writes as bytes or as unknown."""
    if is_byte_level(content):
        return []
    normalizer = Tokenizer.from_str(json.dumps(content)).normalizer
    seen = Counter(c for text in texts for c in (normalizer.normalize_str(text) if normalizer else text))
    missing = []
    for letter, count in seen.most_common():
        if count < 2 or not letter.isalpha() or letter in vocabulary:
            continue
        in_bytes = [vocabulary.get(f"<0x{byte:02X}>") for byte in letter.encode()]
        unknown = content["model"].get("unk_id") or vocabulary.get(content["model"].get("unk_token") or "", 0)
        parts = tuple(i for i in in_bytes if i is not None)
        missing.append(NewPiece(letter, parts if len(parts) == len(in_bytes) else (unknown,), count))
    return missing


def _words(content: dict[str, Any], texts: Sequence[str]) -> Iterator[tuple[int, ...]]:
    """The words of the texts as ids; what is no letter parts them."""
    tokenizer = Tokenizer.from_str(json.dumps(content))
    letters = _letters_of_bytes if is_byte_level(content) else _letters
    for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False):
        word: list[int] = []
        owner: int | None = None
        for id_, token, place in zip(encoding.ids, encoding.tokens, encoding.word_ids, strict=True):
            if word and (token.startswith(WORD_MARKS) or place != owner or not letters(token)):
                yield tuple(word)
                word = []
            owner = place
            if letters(token):
                word.append(id_)
        if word:
            yield tuple(word)


def _letters(token: str) -> bool:
    bare = token.removeprefix("▁")
    return token == "▁" or bare.isalpha()


def _letters_of_bytes(token: str) -> bool:
    """Whether the ASCII bytes of a piece are letters; the others belong to letters of several bytes.

    GPT-2's alphabet writes bytes 33 to 126 as themselves and others as characters from 161 on.
    """
    bare = token.removeprefix("Ġ")
    return all(not c.isascii() or c.isalpha() for c in bare) and not any("Ā" <= c <= "Ġ" for c in bare)


def _merges(
    words: Counter[tuple[int, ...]], known: dict[str, int], parts: dict[int, tuple[int, ...]], count: int
) -> tuple[list[NewPiece], list[tuple[str, str]]]:
    """BPE over old pieces in place of characters, by the tokenizers library."""
    names = {i: text for text, i in known.items()}
    used = sorted({i for word in words for i in word if i in names})
    symbol = {i: chr(PRIVATE + n) for n, i in enumerate(used[:0xFFFE])}
    spelled = {"".join(symbol[i] for i in word): n for word, n in words.items() if all(i in symbol for i in word)}
    learner = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        # Some merges only give another way to an old piece, and take no place.
        vocab_size=len(used) + 2 * max(count, 0),
        min_frequency=2,
        show_progress=False,
    )
    learner.train_from_iterator((text for text, n in spelled.items() for _ in range(n)), trainer)
    back = {character: i for i, character in symbol.items()}
    pieces: dict[str, NewPiece] = {}
    merges: list[tuple[str, str]] = []
    for left, right in json.loads(learner.to_str())["model"]["merges"]:
        text = "".join(names[back[c]] for c in left + right)
        if text not in known and text not in pieces:
            if len(pieces) >= count:
                break
            old = tuple(part for c in left + right for part in parts.get(back[c], (back[c],)))
            occurrences = sum(n * word.count(left + right) for word, n in spelled.items() if left + right in word)
            pieces[text] = NewPiece(text, old, occurrences)
        merges.append(("".join(names[back[c]] for c in left), "".join(names[back[c]] for c in right)))
    return list(pieces.values()), merges
