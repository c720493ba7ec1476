"""The checkpoints of a run: written by all ranks, verified, kept, found again.

    checkpoints/step-000010/manifest.json            every file with size and checksum, written last
    checkpoints/step-000010/progress.json            steps done and what else is counted
    checkpoints/step-000010/student/, critic/        DeepSpeed's files: weights, optimizer, one or more for each rank
    checkpoints/step-000010/reference/               weights of a reference that moves
    checkpoints/latest, checkpoints/best             names of checkpoints

What a step draws from its data and its random numbers are pure functions of (seed, step, prompt), so neither a cursor
nor a generator's state has to be saved.

A checkpoint is written into step-N.partial, which gets its name when all is on disk; then `latest` moves. So a
step-N that is not whole was damaged later: it is renamed to step-N.damaged, and the run goes on from the one before.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from configs.files import write_atomically
from configs.schema import CheckpointConfig
from training import distributed
from training.checkpoint_files import Manifest, Written, sync, write_state, wrong_content, wrong_size
from training.run_folder import Progress

log = logging.getLogger(__name__)
PROGRESS = "progress.json"
PARTIAL, DAMAGED = ".partial", ".damaged"
LIBRARIES = ("deepspeed", "torch", "transformers")


class CheckpointFailed(Exception):
    """A checkpoint could not be written, on every rank together; the ones before it are untouched."""


class NoWholeCheckpoint(ValueError):
    """There are checkpoints, and none of them is whole."""


class Saveable(Protocol):
    """An engine or a reference. Methods are collective."""

    def save(self, directory: Path) -> Sequence[tuple[Path, Any]]:
        """This rank's files below `directory` with what goes into them (bytes, or what torch.save takes)."""
        ...

    def load(self, directory: Path) -> None:
        """Read what was written."""
        ...


@dataclass(frozen=True)
class Found:
    """A whole checkpoint."""

    directory: Path
    manifest: Manifest
    progress: Progress


class Checkpoints:
    """Methods are called by all ranks together, unless they say otherwise."""

    def __init__(self, directory: Path, config: CheckpointConfig) -> None:
        self.directory = directory
        self._config = config
        self._newest: int | None = None
        self.seconds = 0.0
        """What the last checkpoint cost the run, seconds."""

    def save(self, parts: Mapping[str, Saveable], progress: Progress) -> None:
        """Write a checkpoint of this step, unless there is one. Raises CheckpointFailed on every rank."""
        if progress.step == self._newest:
            return
        started = time.monotonic()
        tag = step_tag(progress.step)
        partial = self.directory / f"{tag}{PARTIAL}"
        if distributed.is_main():
            shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
        distributed.barrier()
        # DeepSpeed only collects here; a disk that is full for one rank must not leave the others in its barriers.
        states = [state for name, part in parts.items() for state in part.save(partial / name)]
        if distributed.is_main():
            states.append((partial / PROGRESS, json.dumps(asdict(progress)).encode()))
        stages = {
            name: stage for name, part in parts.items() if (stage := getattr(part, "zero_stage", None)) is not None
        }
        self._write(partial, states, progress.step, stages)
        self._newest = progress.step
        self.seconds = time.monotonic() - started

    def _write(self, partial: Path, states: Sequence[tuple[Path, Any]], step: int, stages: Mapping[str, int]) -> None:
        """This rank's files; then, if every rank has written its own, the manifest, the name and `latest`."""
        written: dict[str, dict[str, Any]] = {}
        problem = ""
        try:
            for path, state in states:
                written[str(path.relative_to(partial))] = asdict(write_state(path, state))
        except (OSError, RuntimeError) as error:
            problem = f"rank {distributed.rank()}: {error}"
        reports = distributed.gather_strings([json.dumps(written), problem])
        problems = [text for text in reports[1::2] if text]
        if distributed.is_main() and not problems:
            files = {name: Written(**entry) for report in reports[::2] for name, entry in json.loads(report).items()}
            versions = {name: version(name) for name in LIBRARIES}
            try:
                self._publish(partial, Manifest(step, distributed.world_size(), stages, versions, files))
            except OSError as error:
                problem = str(error)
        problems += [text for text in distributed.gather_strings([problem if not problems else ""]) if text]
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
        for lines in self.directory.parent.glob("*.jsonl"):
            sync(lines)  # no step that the checkpoint holds may be missing there
        target = self.directory / step_tag(manifest.step)
        if target.exists():
            self._delete(target)
        partial.rename(target)
        sync(self.directory)
        write_atomically(self.directory / "latest", target.name)
        sync(self.directory)
        self._prune()

    def mark_best(self, step: int) -> None:
        """`best` names the checkpoint of this step, which `save` has written, from now on; it is kept at any age."""
        if distributed.is_main():
            write_atomically(self.directory / "best", step_tag(step))

    def best(self) -> Path | None:
        """The checkpoint that `mark_best` named, or None. Not collective."""
        tag = _read(self.directory / "best")
        return self.directory / tag if tag and (self.directory / tag).is_dir() else None

    def _prune(self) -> None:
        """Delete all but the newest and the best."""
        for step in step_numbers(self.directory)[: -self._config.keep]:
            if (old := self.directory / step_tag(step)) != self.best():
                self._delete(old)

    def _delete(self, checkpoint: Path) -> None:
        """Under another name, so that a half-deleted one is not taken for a damaged one."""
        doomed = checkpoint.with_name(f"{checkpoint.name}.old{PARTIAL}")
        shutil.rmtree(doomed, ignore_errors=True)
        shutil.rmtree(checkpoint.rename(doomed), ignore_errors=True)

    def find(self) -> Found | None:
        """The newest whole checkpoint; damaged ones on the way are renamed, with a warning. None in a new run.

        Raises NoWholeCheckpoint on every rank where there are checkpoints, all of them damaged.
        """
        steps = json.loads(distributed.gather_strings([json.dumps(self._candidates())])[0])
        damage: list[str] = []
        for step in steps:
            directory = self.directory / step_tag(step)
            found = self._read(directory)
            problems = [text for text in distributed.gather_strings([found if isinstance(found, str) else ""]) if text]
            if not problems:
                assert isinstance(found, Found)
                if distributed.is_main():
                    self._set_aside(damage, directory)
                distributed.barrier()
                return found
            damage.append(f"{directory.name}: {problems[0]}")
        if damage:
            raise NoWholeCheckpoint(
                f"{self.directory}: no checkpoint is whole ({'; '.join(damage)}); choose another --name to start anew, "
                "or delete that folder"
            )
        return None

    def _candidates(self) -> list[int]:
        """Steps to try, newest first: what `latest` names, there or not, and what is older."""
        steps = step_numbers(self.directory)
        latest = (_read(self.directory / "latest") or "").removeprefix("step-")
        if latest.isdigit():
            steps = sorted({int(latest), *(step for step in steps if step < int(latest))})
        return steps[::-1]

    def _read(self, directory: Path) -> Found | str:
        """The checkpoint, or what is wrong with it. Each rank reads a share of its files."""
        try:
            manifest = Manifest.read(directory)
            if (wrong := wrong_size(directory, manifest.files)) is not None:
                return wrong
            mine = sorted(manifest.files)[distributed.rank() :: distributed.world_size()]
            if (wrong := wrong_content(directory, mine, manifest.files)) is not None:
                return wrong
            progress = Progress(**json.loads((directory / PROGRESS).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            return str(error)
        return Found(directory, manifest, progress)

    def _set_aside(self, damage: Sequence[str], whole: Path) -> None:
        """Rename what was found damaged, and say so; delete what was never finished. Rank 0 alone."""
        for unfinished in self.directory.glob(f"*{PARTIAL}"):
            shutil.rmtree(unfinished, ignore_errors=True)
        for text in damage:
            directory = self.directory / text.partition(":")[0]
            aside = directory.with_name(f"{directory.name}{DAMAGED}")
            number = 1
            while aside.exists():
                number += 1
                aside = directory.with_name(f"{directory.name}{DAMAGED}-{number}")
            if directory.exists():
                directory.rename(aside)
            log.warning("checkpoint %s; kept as %s, the run goes on from %s", text, aside.name, whole.name)
        if damage:
            write_atomically(self.directory / "latest", whole.name)

    def load(self, found: Found, parts: Mapping[str, Saveable]) -> Progress:
        """Read a checkpoint into the models."""
        for name, part in parts.items():
            part.load(found.directory / name)
        self._newest = found.progress.step
        return found.progress


def step_tag(step: int) -> str:
    """Name of the checkpoint after `step` steps."""
    return f"step-{step:06d}"


def step_numbers(directory: Path) -> list[int]:
    """Steps that there are checkpoints of, whole or damaged, in order."""
    names = (p.name.removeprefix("step-") for p in directory.glob("step-*") if p.is_dir())
    return sorted(int(name) for name in names if name.isdigit())


def _read(pointer: Path) -> str | None:
    """The name in `latest` or `best`; None where there is none."""
    try:
        return pointer.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None
