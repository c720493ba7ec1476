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
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map_only

from configs.files import write_atomically
from configs.schema import CheckpointConfig, RunConfig, as_dict
from training import distributed
from training.checkpoint_files import Manifest, Written, sync, write_state, wrong_content, wrong_size
from training.cli import dump_config
from training.deepspeed_engine import reshape
from training.run_folder import Progress, RunFolder

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

    def to_reshape(self, stages: Mapping[str, int]) -> list[str]:
        """Which of these engines (ZeRO stages by name) are cut otherwise than they were saved."""
        same_ranks = self.manifest.world_size == distributed.world_size()
        saved = self.manifest.zero_stages
        # Without ZeRO each rank reads all of it, whatever their number.
        return [name for name, stage in stages.items() if saved[name] != stage or (stage > 0 and not same_ranks)]

    def check(self, stages: Mapping[str, int], dtype: str) -> None:
        """Raises ValueError where DeepSpeed cannot cut it for this number of ranks and these ZeRO stages."""
        saved, ranks = self.manifest.zero_stages, self.manifest.world_size
        for name, stage in stages.items():
            key = f"{'actor' if name == 'student' else name}.zero_stage"
            if name in saved and saved[name] != stage and {saved[name], stage} != {1, 2}:
                raise ValueError(
                    f"{key} = {stage}: {self.directory} was written at stage {saved[name]}, and DeepSpeed converts "
                    f"between stages 1 and 2 only; set it to {saved[name]}, or choose another --name"
                )
            if name in saved and stage == 0 and dtype == "bfloat16" and ranks != distributed.world_size():
                raise ValueError(
                    f"{key} = 0: {self.directory} was written by {ranks} ranks, and bfloat16 without ZeRO goes on with "
                    f"as many only; start {ranks} in place of {distributed.world_size()}"
                )


class Checkpoints:
    """Methods are called by all ranks together, unless they say otherwise."""

    def __init__(self, directory: Path, config: CheckpointConfig) -> None:
        self.directory = directory
        self._config = config
        self._newest: int | None = None
        self._group = distributed.side_group() if config.asynchronous else None
        self._writer: threading.Thread | None = None
        self._failure: CheckpointFailed | None = None
        self._deletions: list[threading.Thread] = []
        self.seconds = 0.0
        """How long the run stood still for the last checkpoint."""

    def save(self, parts: Mapping[str, Saveable], progress: Progress) -> None:
        """Write a checkpoint of this step, unless there is one.

        Raises CheckpointFailed on every rank where any could not write; where checkpoints are asynchronous, the next
        call or `wait` does so.
        """
        if progress.step == self._newest:
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
        stages = _stages(parts)
        self._newest = progress.step
        if self._config.asynchronous:
            states = [(path, _copy(state)) for path, state in states]
            work = (partial, states, progress.step, stages)
            self._writer = threading.Thread(target=self._write, args=work, name="checkpoint", daemon=True)
            self._writer.start()
        else:
            self._write(partial, states, progress.step, stages)
            self._raise_failure()
        self.seconds = time.monotonic() - started

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
        """Return when no checkpoint is being written or deleted any more. Raises CheckpointFailed for the last one."""
        if self._writer is not None:
            self._writer.join()
        self._writer = None
        while self._deletions:
            self._deletions.pop().join()
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            failure, self._failure, self._newest = self._failure, None, None
            raise failure

    def _write(self, partial: Path, states: Sequence[tuple[Path, Any]], step: int, stages: Mapping[str, int]) -> None:
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
            self._failure = CheckpointFailed(f"the checkpoint of step {step} could not be written: {problems[0]}")

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
        self.wait()
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
        """In the background, under another name, so that a half-deleted one is not taken for a damaged one."""
        doomed = checkpoint.with_name(f"{checkpoint.name}.old{PARTIAL}")
        shutil.rmtree(doomed, ignore_errors=True)
        checkpoint.rename(doomed)
        deletion = threading.Thread(target=shutil.rmtree, args=(doomed, True), name="delete", daemon=True)
        self._deletions.append(deletion)
        deletion.start()

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
        for pointer in ("latest", "best"):
            for unfinished in self.directory.glob(f".{pointer}.*"):  # killed while it moved
                unfinished.unlink()
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

    def load_best(self, parts: Mapping[str, Saveable]) -> int:
        """Read what `mark_best` named into the models; its step. Raises NoWholeCheckpoint on every rank."""
        directory = self.best()
        found = "there is none" if directory is None else self._read(directory)
        problems = [text for text in distributed.gather_strings([found if isinstance(found, str) else ""]) if text]
        if problems:
            raise NoWholeCheckpoint(f"{self.directory / 'best'}: the best checkpoint cannot be read: {problems[0]}")
        assert isinstance(found, Found)
        return self.load(found, parts).step

    def load(self, found: Found, parts: Mapping[str, Saveable]) -> Progress:
        """Read a checkpoint into the models."""
        other = found.to_reshape(_stages(parts))
        reshaped = self.directory / f"{found.directory.name}.universal{PARTIAL}"
        problem = ""
        if other and distributed.is_main():
            try:
                for name in other:
                    reshape(found.directory / name, reshaped / name)
            except Exception as error:  # a library's converter; all ranks have to hear of it
                problem = f"{type(error).__name__}: {error}"
        if problem := distributed.gather_strings([problem])[0]:
            raise ValueError(f"{found.directory} cannot be cut anew for this number of ranks or ZeRO stage: {problem}")
        for name, part in parts.items():
            part.load((reshaped if name in other else found.directory) / name)
        distributed.barrier()
        if distributed.is_main():
            shutil.rmtree(reshaped, ignore_errors=True)
        self._newest = found.progress.step
        return found.progress


@dataclass(frozen=True)
class OpenRun:
    """A run's folder, ready to begin or to go on."""

    folder: RunFolder
    checkpoints: Checkpoints
    found: Found | None
    """The checkpoint to go on from; None in a new run."""

    def load(self, parts: Mapping[str, Saveable], new: Progress | None = None) -> Progress:
        """Read the checkpoint into the models; a new run's progress is `new`. Collective."""
        return (new or Progress()) if self.found is None else self.checkpoints.load(self.found, parts)


def open_run(folder: RunFolder, config: RunConfig, stages: Mapping[str, int]) -> OpenRun:
    """Find the checkpoint to go on from, and make the folder agree with it. Collective.

    `stages` are the ZeRO stages of the engines by name. Raises ValueError where there are checkpoints and the run
    cannot go on from any of them.
    """
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint)
    found = checkpoints.find()
    if found is not None:
        found.check(stages, config.student.dtype)
    if distributed.is_main():
        if found is None:
            folder.start_afresh(dump_config(as_dict(config)))
        else:
            folder.forget_after(found.progress.step)
    distributed.barrier()
    return OpenRun(folder, checkpoints, found)


def step_tag(step: int) -> str:
    """Name of the checkpoint after `step` steps."""
    return f"step-{step:06d}"


def step_numbers(directory: Path) -> list[int]:
    """Steps that there are checkpoints of, whole or damaged, in order."""
    names = (p.name.removeprefix("step-") for p in directory.glob("step-*") if p.is_dir())
    return sorted(int(name) for name in names if name.isdigit())


def _stages(parts: Mapping[str, Saveable]) -> dict[str, int]:
    """ZeRO stages of those that are engines."""
    return {name: part.zero_stage for name, part in parts.items() if hasattr(part, "zero_stage")}


def _copy(state: Any) -> Any:
    """The same with tensors of its own, in the host's memory."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), state)


def _read(pointer: Path) -> str | None:
    """The name in `latest` or `best`; None where there is none."""
    try:
        return pointer.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None
