"""Going on: with which settings, from which checkpoint, on how many ranks.

A checkpoint is written under another name first (training/run/checkpoints.py), so a step-N that is not whole was
damaged later: it is renamed to step-N.damaged, and the run goes on from the one before.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
import yaml

from configs.io.claims import claim
from configs.io.files import read_json, write_atomically
from configs.io.tables import content
from configs.schema import DEMO, ExtraTeacherConfig, RunConfig, as_dict, flat
from training import distributed
from training.run.boards import IDS
from training.run.checkpoint_files import Manifest, UnknownFormat, Written, wrong_size
from training.run.checkpoints import PARTIAL, PROGRESS, Checkpoints, Saveable, engines_of, read_pointer, step_tag
from training.run.cli import dump_config
from training.run.run_folder import Progress, RunFolder, checkpoint_steps
from training.run.stopping import RunFailed

log = logging.getLogger(__name__)
DATA, DAMAGED = "data.json", ".damaged"
CHUNK = 1 << 24
"""Bytes of a file read at a time while it is checked."""
PLACES, PLACE = 64, 1 << 16
"""Of a file of weights, so many places of so many bytes are looked at; all of one that is not larger than that."""
FREE_SETTINGS = re.compile(
    r"steps|report_to|export\..*|sft\.(steps|output)|(actor|critic)\.zero_stage|actor\.micro_batch_tokens|threads"
    r"|runs_dir|cache_dir|name"
    r"|checkpoint\..*|(teacher|teachers\[\d+\])\.(address|interface|port|threads|timeout_s|devices|tensor_parallel)"
    r"|(teacher|teachers\[\d+\])\.(url|max_batch_tokens|max_cache_tokens|logit_chunk)|time_limit_s|stuck_timeout_s"
    r"|eval\.batch|sampling\.prompts_at_once|student\.gradient_checkpointing"
)
"""Settings that may differ when a run is resumed: what its numbers are made of stays. Where memory runs out, those that
help are among them (training/run/supervisor.py)."""


class NoWholeCheckpoint(ValueError):
    """There are checkpoints, and none of them is whole."""


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


@dataclass(frozen=True)
class OpenRun:
    """A run's folder, ready to begin or to go on."""

    folder: RunFolder
    checkpoints: Checkpoints
    found: Found | None
    """The checkpoint to go on from; None in a new run."""

    def load(self, parts: Mapping[str, Saveable], new: Progress | None = None) -> Progress:
        """Read the checkpoint into the models; a new run's progress is `new`. Collective."""
        if self.found is None:
            return new or Progress()
        self.checkpoints.newest = self.found.progress.step
        return load(self.found, parts)


def open_run(folder: RunFolder, config: RunConfig, stages: Mapping[str, int], number: int = 2) -> OpenRun:
    """Claim the folder, find the checkpoint to go on from, and make the folder agree with it. Collective.

    `stages` are the ZeRO stages of the engines by name, `number` is the run's own stage. Raises ValueError where
    another program writes there, and where there are checkpoints and the run cannot go on from any of them.
    """
    distributed.together(lambda: claim(folder.path) if distributed.is_main() else None, ValueError)
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint)
    found = find(folder.checkpoints)
    if found is not None:
        found.check(stages, config.student.dtype)
    if distributed.is_main():
        if found is None:
            start_afresh(folder, config, number)
        else:
            folder.forget_after(found.progress.step)
    distributed.barrier()
    return OpenRun(folder, checkpoints, found)


def find(directory: Path) -> Found | None:
    """The newest whole checkpoint; damaged ones on the way are renamed, with a warning. None in a new run. Collective.

    Raises NoWholeCheckpoint on every rank where there are checkpoints, all of them damaged, and UnknownFormat where
    the newest is of a later version.
    """
    steps = json.loads(distributed.gather_strings([json.dumps(_candidates(directory))])[0])
    damage: list[str] = []
    for step in steps:
        checkpoint = directory / step_tag(step)
        found = _read(checkpoint)
        if isinstance(found, Found):
            if distributed.is_main():
                _set_aside(directory, damage, checkpoint)
            distributed.barrier()
            return found
        damage.append(f"{checkpoint.name}: {found}")
    if damage:
        raise NoWholeCheckpoint(
            f"{directory}: no checkpoint is whole ({'; '.join(damage)}); choose another --name for a new run, "
            "or delete that folder"
        )
    return None


def _candidates(directory: Path) -> list[int]:
    """Steps to try, newest first: what `latest` names, there or not, and what is older."""
    steps = checkpoint_steps(directory)
    latest = (read_pointer(directory / "latest") or "").removeprefix("step-")
    if latest.isdigit():
        steps = sorted({int(latest), *(step for step in steps if step < int(latest))})
    return steps[::-1]


def _read(directory: Path) -> Found | str:
    """The checkpoint, or what is wrong with it; each rank reads a share of its files. Collective. Raises
    UnknownFormat."""
    found, problem = None, None
    try:
        manifest = Manifest.read(directory)
        mine = sorted(manifest.files)[distributed.rank() :: distributed.world_size()]
        problem = wrong_size(directory, manifest.files) or _wrong_content(directory, mine, manifest.files)
        problem = problem or _not_data(directory, mine)
        if problem is None:
            progress = Progress(**read_json(directory / PROGRESS))
            found = Found(directory, manifest, progress)
    except UnknownFormat:
        raise
    except (OSError, ValueError, TypeError) as error:
        problem = str(error)
    problems = [text for text in distributed.gather_strings([problem or ""]) if text]
    if problems:
        return problems[0]
    assert found is not None
    return found


def _wrong_content(directory: Path, names: Iterable[str], files: Mapping[str, Written]) -> str | None:
    """The first of these files whose content is not what was written, in words; None where all are as they were."""
    for name in names:
        digest = xxhash.xxh3_128()
        try:
            with (directory / name).open("rb", buffering=0) as file:
                while block := file.read(CHUNK):
                    digest.update(block)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if digest.hexdigest() != files[name].xxh3:
            return f"{name} is damaged (its checksum differs)"
    return None


def _not_data(directory: Path, names: Iterable[str]) -> str | None:
    """The first of these files of torch.save that names something other than data, in words; None where there is none.

    Nothing is loaded. What counts as data is torch's list and what training/student/deepspeed_engine.py adds to it.
    """
    for name in names:
        if name.endswith(".pt"):
            try:
                found = torch.serialization.get_unsafe_globals_in_checkpoint(directory / name)
            except Exception as error:  # a pickle can be broken in many ways
                return f"{name} is no file of torch.save ({' '.join(str(error).split())[:100]})"
            if found:
                return f"{name} names {', '.join(sorted(found)[:3])}: no data, so reading it could run a program"
    return None


def _set_aside(directory: Path, damage: Sequence[str], whole: Path) -> None:
    """Rename what was found damaged, and say so; delete what was never finished. Rank 0 alone."""
    for unfinished in directory.glob(f"*{PARTIAL}"):
        shutil.rmtree(unfinished, ignore_errors=True)
    for pointer in ("latest", "best"):
        for unfinished in directory.glob(f".{pointer}.*"):  # killed while it moved
            unfinished.unlink()
    for text in damage:
        broken = directory / text.partition(":")[0]
        names = (broken.name + DAMAGED + (f"-{n}" if n > 1 else "") for n in itertools.count(1))
        aside = next(path for name in names if not (path := directory / name).exists())
        if broken.exists():
            broken.rename(aside)
        log.warning("checkpoint %s; kept as %s, the run goes on from %s", text, aside.name, whole.name)
    if damage:
        write_atomically(directory / "latest", whole.name)


def load_best(checkpoints: Checkpoints, parts: Mapping[str, Saveable]) -> int:
    """Read what `mark_best` named into the models; its step. Raises NoWholeCheckpoint on every rank."""
    directory = checkpoints.best()
    found = "there is none" if directory is None else _read(directory)
    if isinstance(found, str):
        raise NoWholeCheckpoint(f"{checkpoints.directory / 'best'}: the best checkpoint cannot be read: {found}")
    return load(found, parts).step


def load(found: Found, parts: Mapping[str, Saveable]) -> Progress:
    """Read a checkpoint into the models. Collective."""
    engines = engines_of(parts)
    other = found.to_reshape({name: engine.zero_stage for name, engine in engines.items()})
    reshaped = found.directory.with_name(f"{found.directory.name}.universal{PARTIAL}")

    def reshape() -> str:
        try:
            for name in other:
                engines[name].reshape(found.directory / name, reshaped / name)
        except Exception as error:  # a library's converter; all ranks have to hear of it
            return f"{type(error).__name__}: {error}"
        return ""

    if other and (problem := distributed.gather_strings([distributed.by_main(reshape) or ""])[0]):
        raise ValueError(f"{found.directory} cannot be cut anew for this number of ranks or ZeRO stage: {problem}")
    try:
        for name, part in parts.items():
            part.load((reshaped if name in other else found.directory) / name)
    except pickle.UnpicklingError as error:  # not in torch's short list of what may be in a checkpoint
        raise RunFailed(f"{found.directory} is refused: {' '.join(str(error).split())[:300]}") from None
    distributed.barrier()
    if distributed.is_main():
        shutil.rmtree(reshaped, ignore_errors=True)
    return found.progress


def check_settings(folder: RunFolder, config: RunConfig, number: int = 2) -> None:
    """A run of stage `number` goes on only with the settings, models and data that it was started with. Raises
    ValueError naming what differs.

    A setting that is younger than the run had its default then.
    """
    if not folder.config.is_file() or not checkpoint_steps(folder.checkpoints):
        return
    states, began = folder.read_json(DATA) or {}, f"when {folder.path} was started"
    if (stage := states.pop("stage", number)) != number:
        raise ValueError(f"name = {folder.path.name!r}: {folder.path} is a run of stage {stage}; choose another --name")
    for key, (path, now) in _inputs(config).items():
        if key in states and now not in ("", states[key]):
            what, means = ("file", "rows") if key.startswith("data.") else ("model", "numbers")
            raise ValueError(
                f"{key} = {path!r}: not what it was {began}, so its steps would mean other {means}; put the old {what} "
                "back, or choose another --name"
            )
    written = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    defaults = RunConfig(teachers=(ExtraTeacherConfig(name=""),) * len(written.get("teachers") or ()))
    default, new = (flat(json.loads(json.dumps(as_dict(c)))) for c in (defaults, config))
    old = default | flat(written)
    keys = sorted(key for key in old.keys() | new.keys() if not FREE_SETTINGS.fullmatch(key))
    changed = [f"{k}: {old.get(k)!r} then, {new.get(k)!r} now" for k in keys if old.get(k) != new.get(k)]
    if changed:
        raise ValueError(
            f"name = {folder.path.name!r}: {folder.path} was started with other settings ({', '.join(changed[:5])}); "
            "choose another --name, or delete that folder"
        )


def start_afresh(folder: RunFolder, config: RunConfig, number: int = 2) -> None:
    """Write the resolved configuration and drop what a run left here that never reached a checkpoint."""
    write_atomically(folder.config, dump_config(as_dict(config)))
    folder.write_json(DATA, {"stage": number, **{key: state for key, (_, state) in _inputs(config).items() if state}})
    folder.forget_after(0)
    for stale in [*(folder.path / "eval").glob("*.json"), folder.path / "summary.json", folder.path / IDS]:
        stale.unlink(missing_ok=True)


def _inputs(config: RunConfig) -> dict[str, tuple[str, str]]:
    """Path of each model and each file, folder or data set, by the key that names it, and what is in it; "" for
    nothing, and for the demo."""
    models = {"student.path": config.student.path}
    models |= {f"{key}.path": teacher.path for key, teacher in config.every_teacher.items()}
    names = ("prompts", "warmup", "heldout", "open", "validation", "text")
    data = {f"data.{name}": str(getattr(config.data, name) or DEMO) for name in names}
    found = {key: (path, _weights(Path(path))) for key, path in models.items()}
    return found | {key: (path, "" if path == DEMO else content(path)) for key, path in data.items()}


def _weights(model: Path) -> str:
    """Which weights a model directory holds, by places all over its files, which may be large; "" where it has none."""
    digest, files = xxhash.xxh3_128(), sorted(model.glob("*.safetensors"))
    for file in files:
        with file.open("rb", buffering=0) as opened:
            size = opened.seek(0, os.SEEK_END)
            for place in range(0, size, max(size // PLACES, PLACE)):
                opened.seek(place)
                digest.update(opened.read(PLACE))
    return digest.hexdigest() if files else ""
