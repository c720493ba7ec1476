"""Fingerprints: do two sides mean the same by a token id? Read from tokenizer.json, without the tokenizer itself."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from inference.checks import read_json


def tokenizer_fingerprint(path: Path | str) -> str:
    """Hash of the vocabulary (id -> piece, added tokens too) and the merges of a tokenizer directory."""
    vocabulary, merges = _pieces(Path(path))
    return _digest({"vocabulary": sorted(vocabulary.items()), "merges": merges})


def vocabulary_fingerprint(path: Path | str) -> str:
    """Hash of the vocabulary alone."""
    vocabulary, _ = _pieces(Path(path))
    return _digest({"vocabulary": sorted(vocabulary.items())})


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=True).encode()).hexdigest()[:32]


def _pieces(path: Path) -> tuple[dict[int, str], list[str]]:
    """id -> piece, and the merges as `a b`."""
    file = path / "tokenizer.json"
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
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return json.loads(backend.to_str()) if backend is not None else {"pieces": tokenizer.get_vocab()}
