"""The teacher's output layer alone, for a client that turns hidden states into full-vocabulary distributions."""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path
from typing import Any

import torch

from configs.io.files import read_json
from inference.model.families import FAMILIES, text_settings
from inference.model.files import Checkpoint
from inference.model.weights import open_slice
from inference.protocol.fingerprint import tokenizer_fingerprint
from inference.protocol.replies import NONE

logger = logging.getLogger("teacher")
_SAMPLED_ROWS = 64
_NAMES = (r"(^|\.)(lm_head|embed_out)\.weight$", r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in)\.weight$")
"""An output layer's own tensor, or the embedding that it is tied to: what transformers takes, in this order."""


def load_output_layer(model_dir: Path | str) -> torch.Tensor:
    """[V, Hidden] in the file's type: logits are hidden @ this.T, soft-capped where `logit_softcap` says so. Only this
    tensor is read. Raises ValueError where the files hold none that can be read."""
    source, rows = _source(Path(model_dir))
    return source[:rows]


def logit_softcap(model_dir: Path | str) -> float | None:
    """c where logits are c * tanh(product / c) (Gemma 2); None where they are the product itself."""
    config = read_json(Path(model_dir) / "config.json")
    if config.get("model_type") in FAMILIES:
        return text_settings(config).get("final_logit_softcapping")  # Megatron need not know the rest
    from transformers import AutoConfig

    return getattr(AutoConfig.from_pretrained(model_dir).get_text_config(), "final_logit_softcapping", None)


def output_layer_hash(model_dir: Path | str) -> str:
    """Hash of rows spread over the layer: enough to tell two apart."""
    source, rows = _source(Path(model_dir))
    digest = hashlib.sha256()
    for row in range(0, rows, max(1, rows // _SAMPLED_ROWS)):
        digest.update(source[row : row + 1].float().numpy().tobytes())
    return digest.hexdigest()[:32]


def fingerprint_of(path: Path) -> str:
    """The tokenizer's fingerprint for `TeacherInfo`."""
    try:
        return tokenizer_fingerprint(path)
    except Exception as error:  # whatever transformers raises for a directory without a tokenizer
        logger.warning("no tokenizer fingerprint, so clients that have one will be refused: %s", error)
        return NONE


def _source(path: Path) -> tuple[Any, int]:
    """A lazy slice of the layer, and how many of its rows are vocabulary."""
    checkpoint, config = Checkpoint(path), read_json(path / "config.json")
    for pattern in _NAMES:
        for name in checkpoint.tensors:
            if re.search(pattern, name):
                rows = checkpoint.tensors[name].shape[0]
                settings = config.get("text_config", config)
                return open_slice(checkpoint, name), min(rows, settings.get("vocab_size", rows))
    raise ValueError(f"{path}: no tensor with the name of an output layer or an embedding")
