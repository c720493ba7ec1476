"""What a run's folder says, as far as it has been written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from configs.io.files import read_json
from configs.io.lines import whole_rows
from configs.io.results import Result, find_result

STAGES = ("before", "after", "baseline", "teacher")


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """What a run's folder says, as far as it has been written."""

    name: str
    """Name of the folder."""
    summary: dict[str, Any]
    """summary.json, or empty."""
    steps: list[int]
    """Steps with metrics, rising."""
    metrics: dict[str, list[float]]
    """Each numeric key of metrics.jsonl, aligned with `steps`; NaN where a step does not have it."""
    evaluations: dict[str, Result]
    """Of the held-out questions by stage, as far as they have been asked."""
    config: str
    """Text of config.yaml, or empty."""
    settings: dict[str, Any]
    """What that says, by section."""
    minimal_pairs: Result | None
    """What teacher and student said of right and wrong sentences at the start."""


def read_run(run_dir: Path) -> RunFiles:
    """Everything that the page shows; missing files are empty, so that a run can be looked at while it goes on."""
    if not run_dir.is_dir():
        raise ValueError(f"--run = {str(run_dir)!r}: no such folder; give the folder of a run (runs/NAME)")
    known = ("config.yaml", "metrics.jsonl", "summary.json")
    if not any((run_dir / file).is_file() for file in known):
        raise ValueError(f"--run = {str(run_dir)!r}: has none of {', '.join(known)}; give the folder of a run")
    file = run_dir / "summary.json"
    summary = read_json(file) if file.is_file() else {}
    found = {stage: find_result(run_dir / "eval" / f"{stage}.json") for stage in STAGES}
    steps, metrics = _read_metrics(run_dir / "metrics.jsonl")
    file = run_dir / "config.yaml"
    config = file.read_text(encoding="utf-8") if file.is_file() else ""
    return RunFiles(
        name=run_dir.resolve().name,
        summary=summary,
        steps=steps,
        metrics=metrics,
        evaluations={stage: one for stage, one in found.items() if one is not None},
        config=config,
        settings=_settings(config),
        minimal_pairs=find_result(run_dir / "eval" / "minimal_pairs.json"),
    )


def _settings(config: str) -> dict[str, Any]:
    """The settings in the text of a config.yaml; none where it is no YAML, which is still shown as text."""
    try:
        return yaml.safe_load(config) or {}
    except yaml.YAMLError:
        return {}


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read_metrics(path: Path) -> tuple[list[int], dict[str, list[float]]]:
    """Steps and every numeric key. A resumed run may have written a step twice: the last time counts."""
    by_step = {row["step"]: row for row in whole_rows(path) if is_number(row.get("step"))}
    steps = sorted(by_step)
    keys = dict.fromkeys(key for step in steps for key, value in by_step[step].items() if is_number(value))
    keys.pop("step", None)
    nan = float("nan")
    return steps, {
        key: [float(by_step[step][key]) if is_number(by_step[step].get(key)) else nan for step in steps] for key in keys
    }
