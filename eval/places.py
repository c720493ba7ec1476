"""Where evaluations lie: RUN/eval for a run's export, RUNS_DIR/models/NAME-HASH/eval for another model."""

from __future__ import annotations

import hashlib
from pathlib import Path


def run_of(model: str | Path) -> Path | None:
    """The run whose export this is."""
    path = Path(model).resolve()
    return path.parent if path.name == "export" and (path.parent / "config.yaml").is_file() else None


def eval_dir(model: str | Path, runs_dir: str | Path) -> Path:
    """The folder for what is said of a model; a hub id counts as its own path."""
    run = run_of(model)
    if run is not None:
        return run / "eval"
    resolved = str(Path(model).resolve() if Path(model).exists() else model)
    digest = hashlib.sha256(resolved.encode()).hexdigest()[:8]
    return Path(runs_dir) / "models" / f"{Path(resolved).name}-{digest}" / "eval"


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
