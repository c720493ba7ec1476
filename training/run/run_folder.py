"""A run on disk, runs/NAME. No file is ever half-written, and rank 0 alone writes, but for checkpoints.

config.yaml             resolved settings, from before the first step        training/run/resuming.py
data.json               fingerprints of the data's contents                  training/run/resuming.py
metrics.jsonl           a line a step (TensorBoard: tensorboard/)            the loop
samples.jsonl           prompts, responses, rewards by part                  the loop
starts.jsonl            when each start began and why it ended               training/run/supervisor.py
checkpoints/            training/run/checkpoints.py                          all ranks
token_budget.json       packed tokens of a pass, once halved                 training/run/supervisor.py
eval/, summary.json     evaluations, and what the run came to                stage 2
export/                 the student as a Hugging Face model directory        stage 2
job/                    logs, addresses and settings of a SLURM job          slurm/steps.sh, training/run/job.py
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.io.files import read_json, write_atomically
from configs.io.lines import LineFile, cut_behind
from training.run.boards import Boards

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run has come: everything besides model states that resuming needs. Saved with each checkpoint."""

    step: int = 0
    """Steps that are done."""
    kl_coef: float = 0.0
    """PPO's KL coefficient in force."""
    kl_limit_reached: bool = False
    """The student is as far from its start as it may get (reference.kl_limit)."""
    validated_step: int = 0
    """The last step that was validated (training/evaluation.py)."""
    best_step: int = 0
    """The step that was validated best; 0 where there is none yet."""
    best_value: float | None = None
    """Its eval.metric."""
    stopped_early: bool = False
    """No validation has been better for too long (eval.patience)."""
    skipped_updates: int = 0
    """Updates left out for a non-finite loss or score."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall-clock by phase: total, sample, teacher, reference, update."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Tokens over all ranks: sampled, scored."""

    @property
    def is_best(self) -> bool:
        """The student as it is now is the best so far."""
        return self.best_step == self.step > 0

    @property
    def ends_early(self) -> bool:
        """The run ends before config.steps."""
        return self.kl_limit_reached or self.stopped_early

    def validation_due(self, every: int) -> bool:
        """Is this state of the student to be validated (eval.every), and has not been?"""
        return every > 0 and self.step > self.validated_step and self.step % every == 0


class RunFolder:
    """Paths and writers of one run."""

    def __init__(self, path: Path, report_to: Sequence[str] = ()) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.export = path / "export"
        self.config = path / "config.yaml"
        self.boards = Boards(path, report_to)
        self._lines: dict[str, LineFile] = {}

    def evaluation(self, name: str) -> Path:
        """File of an evaluation's result (configs/io/results.py)."""
        return self.path / "eval" / f"{name}.json"

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """A JSON file in the run folder, whole or not at all."""
        write_atomically(self.path / name, json.dumps(value, ensure_ascii=False, indent=2) + "\n")

    def read_json(self, name: str) -> dict[str, Any] | None:
        """What `write_json` wrote, or None."""
        path = self.path / name
        return read_json(path) if path.is_file() else None

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """One more line in metrics.jsonl or samples.jsonl. While the disk is full, lines are kept in memory."""
        lines = self._lines.setdefault(name, LineFile(self.path / name))
        try:
            lines.append(json.dumps(row, ensure_ascii=False))
        except OSError as error:
            log.warning("%s cannot be written (%s): its lines wait in memory", name, error.strerror)

    def finish_lines(self) -> None:
        """Write the lines that wait: a checkpoint may not be ahead of them. Raises OSError."""
        for lines in self._lines.values():
            lines.flush()

    def append_metrics(self, metrics: Mapping[str, float]) -> None:
        """One step's numbers, in metrics.jsonl and on the boards."""
        self.append("metrics.jsonl", metrics)
        self.boards.log({key: value for key, value in metrics.items() if key != "step"}, int(metrics["step"]))

    def forget_after(self, step: int) -> None:
        """Drop what was logged past the checkpoint that the run goes on from: no step twice, none missing."""
        for name in ("metrics.jsonl", "samples.jsonl", "eval/validation.jsonl"):
            path = self.path / name
            if path.is_file():
                cut_behind(path, lambda row: row["step"] <= step)


def checkpoint_steps(directory: Path) -> list[int]:
    """Steps that there are checkpoints of, whole or damaged, in order."""
    names = (p.name.removeprefix("step-") for p in directory.glob("step-*") if p.is_dir())
    return sorted(int(name) for name in names if name.isdigit())
