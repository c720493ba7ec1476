"""Which model to judge, whether it is one, and where what is said of it goes."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")


def newest_export(runs_dir: Path) -> Path:
    """The export that was written last."""
    exports = [path.parent for path in runs_dir.glob("*/export/config.json")]
    if not exports:
        raise ValueError(
            f"--runs_dir = {str(runs_dir)!r}: no run with an export in it; train first (bash slurm/run_stage2_grpo.sh) "
            "or give --model DIR"
        )
    return max(exports, key=lambda export: (export / "config.json").stat().st_mtime_ns)


def check_model(model: Path) -> None:
    """A directory with configuration, weights and tokenizer, seen before anything is loaded."""
    name = f"--model {model}"
    if not model.is_dir():
        raise ValueError(f"{name}: no such directory; give a Hugging Face model directory")
    if (model / "adapter_config.json").is_file():
        _check_adapter(model, name)
        return
    if not (model / "config.json").is_file():
        raise ValueError(f"{name}: no config.json in it; give a Hugging Face model directory")
    if not any(model.glob("*.safetensors")):
        raise ValueError(f"{name}: no weights (*.safetensors) in it; save the model with save_pretrained")
    if not any((model / file).is_file() for file in TOKENIZER_FILES):
        raise ValueError(f"{name}: no tokenizer in it; save one there with save_pretrained")


def _check_adapter(model: Path, name: str) -> None:
    """An adapter's own weights, and the model that it goes on top of where that is a directory."""
    if not any(model.glob("adapter_model*.safetensors")):
        raise ValueError(f"{name}: no weights (adapter_model.safetensors) in it; save the adapter with save_pretrained")
    try:
        base = json.loads((model / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{name}: adapter_config.json does not say base_model_name_or_path") from None
    if os.path.isabs(base) or base.startswith("."):
        check_model(Path(base))


def run_of(model: Path) -> Path | None:
    """The run whose export this is."""
    run = model.resolve().parent
    return Path(os.path.relpath(run)) if model.resolve().name == "export" and (run / "config.yaml").is_file() else None


def output_folder(model: Path, runs_dir: Path) -> Path:
    """Where results go: beside the run's other evaluations, else into a folder named after the model."""
    run = run_of(model)
    if run is None:
        resolved = model.resolve()
        run = runs_dir / "models" / f"{resolved.name}-{hashlib.sha256(str(resolved).encode()).hexdigest()[:8]}"
    return run / "eval"
