"""Where a run's numbers are shown besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow (`report_to`).

A board is not the run: one that fails is warned of, and the run goes on.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from configs.checks import require
from configs.io.files import read_json, write_atomically

log = logging.getLogger(__name__)
IDS = "boards.json"
"""The run's names on the boards' side, so that a resumed run goes on in the same curve."""
RETRY_S = 3600.0
"""Seconds that a board which could not be opened is left out."""


class Board(NamedTuple):
    """Where the numbers are shown."""

    log: Callable[[Mapping[str, float], int], None]
    """Show those of a step."""
    close: Callable[[], None]


def _tensorboard(folder: Path, step: int) -> Board:
    """Events in FOLDER/tensorboard."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def log(values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return Board(log, writer.close)


def _wandb(folder: Path, step: int) -> Board:
    """A run of the project WANDB_PROJECT (grpo-kd); WANDB_MODE=offline keeps it in FOLDER/wandb for `wandb sync`."""
    import wandb

    name = _known(folder).get("wandb") or uuid.uuid4().hex[:8]
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "grpo-kd"),
        name=folder.name,
        dir=folder,
        id=name,
        resume="allow",
        config=yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")),
    )
    _remember(folder, "wandb", name)
    return Board(lambda values, step: run.log(dict(values), step=step), run.finish)


def _mlflow(folder: Path, step: int) -> Board:
    """A run of the experiment MLFLOW_EXPERIMENT_NAME (grpo-kd) where MLFLOW_TRACKING_URI says."""
    import mlflow

    mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "grpo-kd"))
    known = _known(folder).get("mlflow")
    run = mlflow.start_run(run_id=known, run_name=None if known else folder.name)
    if known is None:
        mlflow.log_artifact(str(folder / "config.yaml"))
    _remember(folder, "mlflow", run.info.run_id)
    return Board(lambda values, step: mlflow.log_metrics(dict(values), step=step), mlflow.end_run)


def _known(folder: Path) -> dict[str, Any]:
    return read_json(folder / IDS) if (folder / IDS).is_file() else {}


def _remember(folder: Path, board: str, name: str) -> None:
    write_atomically(folder / IDS, json.dumps(_known(folder) | {board: name}))


BOARDS: dict[str, Callable[[Path, int], Board]] = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
"""A name in report_to -> what opens it: of the run's folder, and the first step that it shows."""


def board_names(report_to: str) -> list[str]:
    """The names in `report_to`. Raises ValueError for an unknown one, and for one whose package is missing."""
    names = [] if report_to == "none" else [name.strip() for name in report_to.split(",")]
    for name in names:
        require(name in BOARDS, "report_to", report_to, f"use {', '.join(BOARDS)} with commas between, or none")
        found = importlib.util.find_spec(name) is not None
        require(found, "report_to", report_to, f"the package {name} is not installed; pip install {name}")
    return names


class Boards:
    """The boards of one run; each is opened when there is something to show."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._folder, self._open = folder, dict[str, Board]()
        self._not_before = dict.fromkeys(names, 0.0)
        """When each may be opened again, by the monotonic clock."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, when in self._not_before.items():
            if time.monotonic() < when:
                continue
            try:
                if name not in self._open:
                    self._open[name] = BOARDS[name](self._folder, step)
                self._open[name].log(values, step)
            except Exception as error:  # of a disk, a network, somebody's server; metrics.jsonl has the same numbers
                log.warning("report_to: %s does not take step %d (%s)", name, step, " ".join(str(error).split())[:200])
                if self._open.pop(name, None) is None:  # not even opened: each try might wait for a network
                    self._not_before[name] = time.monotonic() + RETRY_S

    def close(self) -> None:
        """The run has finished."""
        while self._open:
            name, board = self._open.popitem()
            try:
                board.close()
            except Exception as error:
                log.warning("report_to: %s cannot be closed (%s)", name, " ".join(str(error).split())[:200])
