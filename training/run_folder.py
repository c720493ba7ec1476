"""A run on disk (docs/architecture.md). Only rank 0 writes, except checkpoints; no file is ever half-written."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from configs.files import write_atomically
from configs.lines import LineFile

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run has come: everything besides model states that resuming needs. Saved with each checkpoint."""

    step: int = 0
    """Steps that are done."""
    kl_coef: float = 0.0
    """PPO's KL coefficient in force."""
    rate_factor: float = 1.0
    """Factor on the learning rate while the student is too far from its start (reference.kl_action: back_off)."""
    kl_limit_reached: bool = False
    """The student is as far from its start as it may get (reference.kl_limit)."""
    validated_step: int = 0
    """The last step that was validated (training/validation.py)."""
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


class RunFolder:
    """Paths and writers of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.export = path / "export"
        self._board: SummaryWriter | None = None
        self._lines: dict[str, LineFile] = {}

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """A JSON file in the run folder, whole or not at all."""
        write_atomically(self.path / name, json.dumps(value, ensure_ascii=False, indent=2) + "\n")

    def read_json(self, name: str) -> dict[str, Any] | None:
        """What `write_json` wrote, or None."""
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def start_afresh(self, config: str) -> None:
        """Write the resolved configuration and drop what a run left here that never reached a checkpoint."""
        write_atomically(self.path / "config.yaml", config)
        self.forget_after(0)
        for stale in [*(self.path / "eval").glob("*.json"), self.path / "summary.json"]:
            stale.unlink(missing_ok=True)

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
        """One step's numbers, in metrics.jsonl and for TensorBoard."""
        self.append("metrics.jsonl", metrics)
        try:
            self._show(metrics)
        except OSError as error:  # metrics.jsonl has the same numbers
            log.warning("TensorBoard's file cannot be written (%s): a new one is begun", error.strerror)
            self._board = None

    def _show(self, metrics: Mapping[str, float]) -> None:
        step = int(metrics["step"])
        if self._board is None:
            self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=step)
        for key, value in metrics.items():
            if key != "step":
                self._board.add_scalar(key, value, step)
        self._board.flush()

    def forget_after(self, step: int) -> None:
        """Drop what was logged past the checkpoint that the run goes on from: no step twice, none missing."""
        for name in ("metrics.jsonl", "samples.jsonl", "eval/validation.jsonl"):
            path = self.path / name
            if path.is_file():
                kept = []
                for line in path.read_text(encoding="utf-8").split("\n"):  # splitlines() would cut at U+2028 too
                    if not line:
                        continue
                    try:
                        row = json.loads(line)
                    except json.JSONDecodeError:
                        break  # a line that a killed run did not finish
                    if row["step"] <= step:
                        kept.append(line + "\n")
                write_atomically(path, "".join(kept))

    def close(self) -> None:
        """Flush TensorBoard."""
        if self._board is not None:
            self._board.close()


def comparison_table(rows: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """The table that a run ends with."""
    lines = [f"{'':16}{'F1':>8}{'exact':>8}{'reverse KL':>12}", "-" * 44]
    for name, scores in rows:
        lines.append(f"{name:16}{scores['f1']:8.1f}{scores['exact_match']:8.1f}{scores['reverse_kl']:12.3f}")
    return "\n".join(lines)
