"""Fingerprints: do two sides mean the same by a token id? Read from tokenizer.json, without the tokenizer itself."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from configs.io.files import read_json
from configs.io.hub import read_tokenizer, tokenizer_home


def tokenizer_fingerprint(path: Path | str) -> str:
    """Hash of the vocabulary (id -> piece, added tokens too) and the merges of a tokenizer directory."""
    return _fingerprint(str(path), _state(path))


@lru_cache(maxsize=16)
def _fingerprint(path: str, state: tuple[object, ...]) -> str:
    vocabulary, merges = _pieces(Path(path))
    content = {"vocabulary": sorted(vocabulary.items()), "merges": merges}
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()[:32]


def _pieces(path: Path) -> tuple[dict[int, str], list[str]]:
    """id -> piece, and the merges as `a b`."""
    file = tokenizer_home(path) / "tokenizer.json"
    content = read_json(file) if file.is_file() else _from_transformers(path)
    if "pieces" in content:
        return {int(i): piece for piece, i in content["pieces"].items()}, []
    model = content["model"]
    vocab = model["vocab"]
    # Unigram models list [piece, score]; the others map piece -> id.
    pairs = enumerate(entry[0] for entry in vocab) if isinstance(vocab, list) else ((i, p) for p, i in vocab.items())
    pieces = {int(i): piece for i, piece in pairs}
    pieces.update({token["id"]: token["content"] for token in content.get("added_tokens") or []})
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or []]
    return pieces, merges


def _from_transformers(path: Path) -> dict[str, Any]:
    """The same for a directory without tokenizer.json (sentencepiece models)."""
    tokenizer = load_tokenizer(path)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return json.loads(backend.to_str()) if backend is not None else {"pieces": tokenizer.get_vocab()}


def load_tokenizer(path: Path | str) -> Any:
    """transformers' tokenizer of a model directory, as `read_tokenizer` has it.

    It is read once and shared: change a copy of it."""
    return _tokenizer(str(path), _state(path))


@lru_cache(maxsize=16)
def _tokenizer(path: str, state: tuple[object, ...]) -> Any:
    from transformers import AutoTokenizer

    return read_tokenizer(AutoTokenizer, path)


def _state(path: Path | str) -> tuple[object, ...]:
    """Names, sizes and times of the files that a tokenizer may be made of."""
    files = sorted(f for f in Path(path).glob("*") if f.suffix in (".json", ".model", ".txt", ".jinja"))
    return tuple((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files)
