"""Which model is measured, whether it is one, and where its results go."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.io.files import read_yaml
from configs.io.hub import base_of, find_model, has_tokenizer, is_adapter


def newest_run(runs_dir: Path, file: str = "config.yaml") -> Path:
    """The run whose `file` was written last. Raises ValueError where none has it."""
    found = list(runs_dir.glob(f"*/{file}"))
    if not found:
        raise ValueError(
            f"--runs_dir = {str(runs_dir)!r}: no run with {file} in it; train first (bash slurm/run_stage2_grpo.sh), "
            "or name one"
        )
    newest = max(found, key=lambda path: path.stat().st_mtime_ns)
    return runs_dir / newest.relative_to(runs_dir).parts[0]


def newest_export(runs_dir: Path) -> Path:
    """The export that was written last."""
    return newest_run(runs_dir, "export/config.json") / "export"


def check_model(named: str | Path) -> Path:
    """The directory of a model, by its path or its hub id, with configuration, weights and tokenizer, seen before
    anything is loaded. Raises ValueError."""
    name, model = f"--model {named}", find_model("--model", named)
    if not model.is_dir():
        raise ValueError(f"{name}: no such directory; give a Hugging Face model directory or a hub id")
    if is_adapter(model):
        try:
            base = base_of(model, weights=True)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        check_model(base)
        return model
    if not (model / "config.json").is_file():
        raise ValueError(f"{name}: no config.json in it; give a Hugging Face model directory")
    if not any(model.glob("*.safetensors")):
        raise ValueError(f"{name}: no weights (*.safetensors) in it; save the model with save_pretrained")
    if not has_tokenizer(model):
        raise ValueError(f"{name}: no tokenizer in it; save one there with save_pretrained")
    return model


def run_of(model: str | Path) -> Path | None:
    """The run whose export this is."""
    path = Path(model).resolve()
    run = path.parent
    return Path(os.path.relpath(run)) if path.name == "export" and (run / "config.yaml").is_file() else None


def run_config(run: Path, needed: Sequence[str] = ()) -> dict[str, Any]:
    """The settings in a run's config.yaml. Raises ValueError where it is not there, or lacks a `needed` section."""
    file = run / "config.yaml"
    content = read_yaml(file)
    if not isinstance(content, dict) or not set(needed) <= content.keys():
        raise ValueError(f"{file}: not the config.yaml of a run; give the folder of a run (runs/NAME)")
    return content


def output_folder(model: str | Path, runs_dir: str | Path) -> Path:
    """Where results go: beside the run's other evaluations, else into a folder named after the model. A hub id, of
    which there is no directory here, counts as its own path."""
    run = run_of(model)
    if run is None:
        resolved = str(Path(model).resolve() if Path(model).exists() else model)
        digest = hashlib.sha256(resolved.encode()).hexdigest()[:8]
        run = Path(runs_dir) / "models" / f"{Path(resolved).name}-{digest}"
    return run / "eval"
