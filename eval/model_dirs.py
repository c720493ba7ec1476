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


def run_of(model: str | Path) -> Path | None:
    """The run whose export this is."""
    path = Path(model).resolve()
    run = path.parent
    return Path(os.path.relpath(run)) if path.name == "export" and (run / "config.yaml").is_file() else None


def output_folder(model: str | Path, runs_dir: str | Path) -> Path:
    """Where results go: beside the run's other evaluations, else into a folder named after the model. A hub id, of
    which there is no directory here, counts as its own path."""
    run = run_of(model)
    if run is None:
        resolved = str(Path(model).resolve() if Path(model).exists() else model)
        digest = hashlib.sha256(resolved.encode()).hexdigest()[:8]
        run = Path(runs_dir) / "models" / f"{Path(resolved).name}-{digest}"
    return run / "eval"


def newest_run(runs_dir: str | Path) -> Path:
    """The run whose evaluation or configuration was written last. Raises ValueError where there is none."""
    runs = [path.parent for path in Path(runs_dir).glob("*/config.yaml")]
    if not runs:
        raise ValueError(
            f"--runs_dir = {str(runs_dir)!r}: no run in it; train first (bash slurm/run_stage2_grpo.sh), or name one"
        )

    def written(run: Path) -> int:
        files = [run / "config.yaml", run / "summary.json", *run.glob("eval/*.json")]
        return max(file.stat().st_mtime_ns for file in files if file.is_file())

    return max(runs, key=written)
