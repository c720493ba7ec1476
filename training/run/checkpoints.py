"""The checkpoints of a run: written by all ranks, verified, kept.

    checkpoints/step-000010/manifest.json            every file with size and checksum, written last
    checkpoints/step-000010/progress.json            steps done and what else is counted
    checkpoints/step-000010/student/, critic/        DeepSpeed's files: weights, optimizer, one or more for each rank
    checkpoints/step-000010/reference/               weights of a reference that moves
    checkpoints/latest, checkpoints/best             names of checkpoints

What a step draws from its data and its random numbers are pure functions of (seed, step, prompt), so neither a cursor
nor a generator's state has to be saved.

A checkpoint is written into step-N.partial, which gets its name when all is on disk; then `latest` moves. So a
step-N that is not whole was damaged later (training/run/resuming.py).
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch.utils._pytree import tree_map_only

from configs.io.files import write_atomically
from configs.schema import CheckpointConfig
from training import distributed
from training.run.checkpoint_files import Manifest, Written, sync, write_state, wrong_size
from training.run.run_folder import Progress, checkpoint_steps
from training.run.stopping import RunFailed

log = logging.getLogger(__name__)
PROGRESS = "progress.json"
PARTIAL = ".partial"
LIBRARIES = ("deepspeed", "torch", "transformers")


class CheckpointFailed(RunFailed):
    """A checkpoint could not be written, on every rank together; the ones before it are untouched."""


class Saveable(Protocol):
    """An engine or a reference. Methods are collective."""

    def save(self, directory: Path) -> Sequence[tuple[Path, Any]]:
        """This rank's files below `directory` with what goes into them (bytes, or what torch.save takes)."""

    def load(self, directory: Path) -> None:
        """Read what was written."""


@runtime_checkable
class SaveableEngine(Saveable, Protocol):
    """Whose files are cut by ranks, at a ZeRO stage."""

    zero_stage: int

    def reshape(self, source: Path, target: Path) -> None:
        """Make of a saved folder one that any number of ranks reads. Rank 0 alone; not from stage 0."""


class Checkpoints:
    """Methods are called by all ranks together, unless they say otherwise."""

    def __init__(self, directory: Path, config: CheckpointConfig) -> None:
        self.directory = directory
        self._config = config
        self.newest: int | None = None
        """Step of the last checkpoint, which is not written again."""
        self._group = distributed.side_group() if config.asynchronous else None
        self._writer: threading.Thread | None = None
        self._failure: Exception | None = None
        self.seconds = 0.0
        """How long the last checkpoint took, written in the background or not."""

    def save(self, parts: Mapping[str, Saveable], progress: Progress) -> None:
        """Write a checkpoint of this step, unless there is one.

        Raises CheckpointFailed on every rank where any could not write; where checkpoints are asynchronous, the next
        call or `wait` does so.
        """
        if progress.step == self.newest:
            return
        started = time.monotonic()
        self.wait()
        tag = step_tag(progress.step)
        partial = self.directory / f"{tag}{PARTIAL}"
        if distributed.is_main():
            shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
        distributed.barrier()
        # DeepSpeed only collects here; a disk that is full for one rank must not leave the others in its barriers.
        states = [state for name, part in parts.items() for state in part.save(partial / name)]
        if distributed.is_main():
            states.append((partial / PROGRESS, json.dumps(asdict(progress)).encode()))
        stages = {name: engine.zero_stage for name, engine in engines_of(parts).items()}
        self.newest = progress.step
        if self._config.asynchronous:
            states = [(path, _copy(state)) for path, state in states]
            work = (started, partial, states, progress.step, stages)
            self._writer = threading.Thread(target=self._write, args=work, name="checkpoint", daemon=True)
            self._writer.start()
        else:
            self._write(started, partial, states, progress.step, stages)
            self.wait()

    @contextmanager
    def tolerated(self) -> Iterator[None]:
        """What cannot be written within ends the run as CheckpointFailed, or is a warning (checkpoint.on_error)."""
        try:
            yield
        except (CheckpointFailed, OSError) as error:
            if self._config.on_error == "stop":
                raise CheckpointFailed(str(error)) from None
            if distributed.is_main():
                log.warning("%s; the run goes on without it (checkpoint.on_error: continue)", error)

    def wait(self) -> None:
        """Return when no checkpoint is being written any more. Raises what the last one failed of."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._failure is not None:
            failure, self._failure, self.newest = self._failure, None, None
            raise failure

    def _write(self, started: float, *work: Any) -> None:
        """Perhaps in a thread of its own, whose errors nobody would see: `wait` raises them."""
        try:
            self._write_all(*work)
        except Exception as error:
            self._failure = error
        self.seconds = time.monotonic() - started

    def _write_all(
        self, partial: Path, states: Sequence[tuple[Path, Any]], step: int, stages: Mapping[str, int]
    ) -> None:
        """This rank's files; then, if every rank has written its own, the manifest, the name and `latest`."""
        written: dict[str, dict[str, Any]] = {}
        problem = ""
        try:
            for path, state in states:
                written[str(path.relative_to(partial))] = asdict(write_state(path, state))
        except Exception as error:  # such as no memory left to write with; the other ranks wait to hear of it
            problem = f"rank {distributed.rank()}: {error}"
        reports = distributed.gather_strings([json.dumps(written), problem], self._group)
        problems = [text for text in reports[1::2] if text]
        if distributed.is_main() and not problems:
            files = {name: Written(**entry) for report in reports[::2] for name, entry in json.loads(report).items()}
            versions = {name: version(name) for name in LIBRARIES}
            try:
                self._publish(partial, Manifest(step, distributed.world_size(), stages, versions, files))
            except OSError as error:
                problem = str(error)
        problems += [text for text in distributed.gather_strings([problem], self._group) if text]
        if problems:
            if distributed.is_main():
                shutil.rmtree(partial, ignore_errors=True)  # its room is needed
            raise CheckpointFailed(f"the checkpoint of step {step} could not be written: {problems[0]}")

    def _publish(self, partial: Path, manifest: Manifest) -> None:
        """Make what all ranks wrote a checkpoint. Rank 0 alone; raises OSError."""
        if (wrong := wrong_size(partial, manifest.files)) is not None:
            raise OSError(f"after writing, {wrong}")
        manifest.save(partial)
        for folder in (*(p for p in partial.rglob("*") if p.is_dir()), partial):
            sync(folder)
        run = self.directory.parent
        for lines in (*run.glob("*.jsonl"), *run.glob("eval/*.jsonl")):
            sync(lines)  # no step that the checkpoint holds may be missing there
        target = self.directory / step_tag(manifest.step)
        old = [_retired(target)] if target.exists() else []
        partial.rename(target)
        sync(self.directory)
        write_atomically(self.directory / "latest", target.name)
        sync(self.directory)
        # A later one was left by a start that was killed before `latest` moved: it is in nobody's place.
        steps = [step for step in checkpoint_steps(self.directory) if step <= manifest.step][: -self._config.keep]
        old += [_retired(path) for step in steps if (path := self.directory / step_tag(step)) != self.best()]
        for checkpoint in old:
            shutil.rmtree(checkpoint, ignore_errors=True)

    def mark_best(self, step: int) -> None:
        """`best` names the checkpoint of this step from now on, and it is kept at any age. Where it could not be
        written (checkpoint.on_error) the best one before it stays."""
        self.wait()
        if distributed.is_main() and (self.directory / step_tag(step)).is_dir():
            write_atomically(self.directory / "best", step_tag(step))

    def best(self) -> Path | None:
        """The checkpoint that `mark_best` named, or None. Not collective."""
        tag = read_pointer(self.directory / "best")
        return self.directory / tag if tag and (self.directory / tag).is_dir() else None


def step_tag(step: int) -> str:
    """Name of the checkpoint after `step` steps."""
    return f"step-{step:06d}"


def _retired(checkpoint: Path) -> Path:
    """It under another name, so that a half-deleted one is not taken for a damaged one."""
    retired = checkpoint.with_name(f"{checkpoint.name}.old{PARTIAL}")
    shutil.rmtree(retired, ignore_errors=True)
    return checkpoint.rename(retired)


def engines_of(parts: Mapping[str, Saveable]) -> dict[str, SaveableEngine]:
    return {name: part for name, part in parts.items() if isinstance(part, SaveableEngine)}


def _copy(state: Any) -> Any:
    """The same with tensors of its own, in the host's memory."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), state)


def read_pointer(pointer: Path) -> str | None:
    """The name in `latest` or `best`; None where there is none."""
    try:
        return pointer.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None
