"""How a tokenizer cuts Faroese, and new pieces for one that cuts it badly.

    python training/tools/tokenizer.py report --student DIR --teacher DIR --text FILE
    python training/tools/tokenizer.py extend --model DIR --text FILE --pieces 500 --output DIR

FILE is JSONL with a `text` in each row, or plain text with one text a line. `extend` holds every tenth text out, learns
the pieces on the others, and says how many bits the model needs for a byte of the held-out texts before and after,
before any training; where that is more than 1.1 times as many, it takes half as many pieces, and again. The result is a
plain Hugging Face model directory.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from configs.io.files import write_atomically
from configs.io.hub import read_tokenizer
from configs.io.jsonl import read_texts

if TYPE_CHECKING:
    from training.tools.tokenizer_pieces import Extension

LETTERS = "ðøáíóúýæ"
WORST = 10
"""Words listed."""
LIMIT = 1.1
"""Held-out bits a byte after `extend`, as a multiple of those before, at most."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """How a tokenizer cuts a text."""

    vocabulary: int
    tokens: int
    tokens_per_word: float
    """Words are what white space parts."""
    bytes_per_token: float
    worst: list[tuple[str, int, list[str]]]
    """(word, occurrences, tokens), the most tokens a letter first, among words of at least four letters."""
    letters: dict[str, tuple[int, int, int]]
    """By letter (both cases): occurrences, those that take more than one token, those in a token that means `unknown`,
    where the letter is lost."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line that says what to mend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    report_ = commands.add_parser("report", help="tokens a word, bytes a token, worst words, Faroese letters")
    report_.add_argument("--student", required=True, help="directory of a model or a tokenizer")
    report_.add_argument("--teacher", help="another one to put beside it")
    extend_ = commands.add_parser("extend", help="add pieces and rows for them")
    extend_.add_argument("--model", required=True, help="Hugging Face model directory")
    extend_.add_argument("--pieces", type=int, default=500, help="new pieces, at most")
    extend_.add_argument("--output", type=Path, required=True, help="directory of the new model")
    for command in (report_, extend_):
        command.add_argument("--text", type=Path, required=True, help="JSONL with `text`, or a text in each line")
    options = parser.parse_args(arguments)
    try:
        texts = read_texts(options.text)
        if options.command == "report":
            _report(options, texts)
        else:
            extend(options.model, texts, options.pieces, options.output)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def load_tokenizer(path: str | Path) -> Any:
    """A fast tokenizer, or ValueError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = read_tokenizer(AutoTokenizer, path)
    except Exception as error:  # half-written files raise nearly anything
        raise ValueError(f"{path}: the tokenizer cannot be loaded ({' '.join(str(error).split())[:200]})") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{path}: {type(tokenizer).__name__} does not say where its tokens lie; give a fast tokenizer")
    return tokenizer


def report(tokenizer: Any, texts: Sequence[str]) -> Report:
    """How `tokenizer` cuts `texts`."""
    tokens, seen, cut, lost = 0, Counter[str](), Counter[str](), Counter[str]()
    words = Counter(word for text in texts for word in re.findall(r"[^\W\d_]+", text))
    for text in texts:
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        tokens += len(found["input_ids"])
        touching = Counter[int]()
        unknown: set[int] = set()
        for id_, (start, end) in zip(found["input_ids"], found["offset_mapping"], strict=True):
            touching.update(range(start, end))
            if id_ == tokenizer.unk_token_id:
                unknown.update(range(start, end))
        for place, letter in enumerate(text.lower() if len(text.lower()) == len(text) else text):
            if letter in LETTERS:
                seen[letter] += 1
                cut[letter] += touching[place] > 1
                lost[letter] += place in unknown
    pieces = {word: tokenizer.tokenize(" " + word) for word in words if len(word) >= 4}
    worst = sorted(pieces, key=lambda word: (-len(pieces[word]) / len(word), -words[word], word))[:WORST]
    return Report(
        vocabulary=len(tokenizer),
        tokens=tokens,
        tokens_per_word=tokens / max(sum(len(text.split()) for text in texts), 1),
        bytes_per_token=sum(len(text.encode()) for text in texts) / max(tokens, 1),
        worst=[(word, words[word], pieces[word]) for word in worst],
        letters={c: (seen[c], cut[c], lost[c]) for c in LETTERS},
    )


def _report(options: argparse.Namespace, texts: Sequence[str]) -> None:
    paths = {"student": options.student} | ({"teacher": options.teacher} if options.teacher else {})
    reports = {name: report(load_tokenizer(path), texts) for name, path in paths.items()}
    print(f"{'':10}{'entries':>9}{'tokens':>9}{'tokens/word':>13}{'bytes/token':>13}")
    for name, one in reports.items():
        numbers = f"{one.vocabulary:9d}{one.tokens:9d}{one.tokens_per_word:13.3f}{one.bytes_per_token:13.3f}"
        print(f"{name:10}{numbers}")
    for name, one in reports.items():
        print(f"\n{name}: of each letter's occurrences, the share that is cut into several tokens (lost: unknown)")
        shown = [
            f"{c} {100 * cut / max(count, 1):.0f} %" + (f" (lost {100 * lost / count:.0f} %)" if lost else "")
            for c, (count, cut, lost) in one.letters.items()
        ]
        print("  " + ", ".join(shown))
        print("  words that split worst: " + ", ".join(f"{word} ({len(tokens)})" for word, _, tokens in one.worst))


def extend(path: str | Path, texts: Sequence[str], pieces: int, output: Path, limit: float = LIMIT) -> float:
    """Write the model with new pieces to `output`; returns held-out bits a byte after over before.

    Pieces that make that more than `limit` are halved in number until they do not: the frequent ones come first.
    Raises ValueError for what cannot be extended, and for an output that exists.
    """
    from training.tools.tokenizer_pieces import learn

    if pieces < 1:
        raise ValueError(f"--pieces = {pieces}: must be at least 1")
    if output.exists():
        raise ValueError(f"--output = {str(output)!r}: exists already; give a new directory")
    if len(texts) < 10:
        raise ValueError(f"--text: {len(texts)} texts; every tenth is held out, so give at least 10")
    held = list(texts[9::10])
    corpus = [text for place, text in enumerate(texts) if place % 10 != 9]
    tokenizer = load_tokenizer(path)
    tokenizer.backend_tokenizer.no_truncation()  # some are saved as they were trained with: texts cut, and filled up
    tokenizer.backend_tokenizer.no_padding()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    while True:
        model, new, ratio = _try(path, tokenizer, content, learn(content, corpus, pieces), corpus, held)
        if ratio <= limit:
            break
        if pieces == 1:
            raise ValueError(f"{path}: a single new piece makes held-out bits a byte {ratio:.3f} times as many")
        pieces //= 2
        print(f"that is more than {limit:g} times: trying {pieces} pieces")
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    for stale in ("tokenizer.model", "vocab.json", "merges.txt"):
        (output / stale).unlink(missing_ok=True)
    write_atomically(output / "tokenizer.json", new.to_str())
    _check_written(output, new, held)
    print(output)
    return ratio


def _try(
    path: str | Path, tokenizer: Any, content: dict[str, Any], extension: Extension, corpus: list[str], held: list[str]
) -> tuple[Any, Any, float]:
    """The model at `path` with the extension's pieces, its tokenizer, and held-out bits a byte after over before."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    from training.tools.tokenizer_pieces import extended
    from training.tools.tokenizer_rows import add_rows, bits_per_byte

    old = tokenizer.backend_tokenizer
    new = Tokenizer.from_str(json.dumps(extended(content, extension), ensure_ascii=False))
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ValueError(f"{path}: the tokenizer names neither bos_token nor eos_token")
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True).eval()
    except Exception as error:  # half-written files raise nearly anything
        raise ValueError(f"{path}: the model cannot be loaded ({' '.join(str(error).split())[:200]})") from error
    size = sum(len(text.encode()) for text in held)
    before = bits_per_byte(model, start, ids_of(old, held), size)
    add_rows(model, extension, start, ids_of(old, corpus), ids_of(new, corpus))
    after = bits_per_byte(model, start, ids_of(new, held), size)
    counts = [sum(map(len, ids_of(one, held))) for one in (old, new)]
    print(f"{len(extension.pieces)} new pieces, ids from {extension.first_id}")
    print(f"held-out tokens {counts[0]} before, {counts[1]} after")
    print(f"held-out bits a byte {before:.4f} before, {after:.4f} after ({after / before:.3f} times), before training")
    return model, new, after / before


def ids_of(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text without special symbols, by a tokenizer of the tokenizers library."""
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def _check_written(output: Path, expected: Any, texts: Sequence[str]) -> None:
    """What transformers loads from the directory cuts the texts as the tokenizer that was measured."""
    loaded = load_tokenizer(output)
    if ids_of(loaded.backend_tokenizer, texts) != ids_of(expected, texts):
        raise ValueError(f"{output}: transformers reads the new tokenizer differently ({type(loaded).__name__})")


if __name__ == "__main__":
    sys.exit(main())
