"""The teacher's output layer alone, for a client that turns hidden states into full-vocabulary distributions."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from inference.checks import read_json
from inference.families import family_of, parse_architecture
from inference.weights import Checkpoint

_SAMPLED_ROWS = 64


def load_output_layer(model_dir: Path | str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """[V, Hidden] in the file's type or `dtype`: logits are hidden @ this.T. Only this tensor is read."""
    rows, checkpoint, name = _locate(Path(model_dir))
    layer = checkpoint.slice(name)[:rows]
    return layer if dtype is None else layer.to(dtype)


def describe_output_layer(model_dir: Path | str) -> dict[str, Any]:
    """Tensor, file and shape of the output layer, and a hash of rows spread over it: enough to tell two apart."""
    rows, checkpoint, name = _locate(Path(model_dir))
    source = checkpoint.slice(name)
    digest = hashlib.sha256()
    for row in range(0, rows, max(1, rows // _SAMPLED_ROWS)):
        digest.update(source[row : row + 1].float().numpy().tobytes())
    return {
        "tensor": name,
        "file": checkpoint.file_of[name].name,
        "shape": [rows, source.get_shape()[1]],
        "sha256_of_sampled_rows": digest.hexdigest()[:32],
    }


def _locate(path: Path) -> tuple[int, Checkpoint, str]:
    config = read_json(path / "config.json")
    architecture = parse_architecture(config)
    checkpoint = Checkpoint(path)
    return architecture.vocab_size, checkpoint, checkpoint.output_name(family_of(config), architecture)
