"""A checkpoint is whole or it does not count; damage costs one checkpoint and is said, never a silent new start."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import CheckpointConfig
from training import distributed
from training.run import checkpoints as checkpoints_module
from training.run.checkpoint_files import write_state
from training.run.checkpoints import CheckpointFailed, Checkpoints
from training.run.resuming import NoWholeCheckpoint, find, load
from training.run.run_folder import Progress


class Tensors:
    """Something that is saved: a file of torch.save and one of plain bytes."""

    def __init__(self, value: float, size: int = 1000) -> None:
        self.tensor = torch.full((size,), value)

    def save(self, directory: Path) -> list[tuple[Path, Any]]:
        return [(directory / "tensor.pt", {"tensor": self.tensor}), (directory / "name.txt", b"f\xc3\xb8royskt")]

    def load(self, directory: Path) -> None:
        self.tensor = torch.load(directory / "tensor.pt", weights_only=True)["tensor"]
        assert (directory / "name.txt").read_text(encoding="utf-8") == "føroyskt"


def write(directory: Path, *steps: int, keep: int = 10) -> Checkpoints:
    """A run that made checkpoints of these steps; the tensor holds the step."""
    checkpoints = Checkpoints(directory / "checkpoints", CheckpointConfig(keep=keep))
    for step in steps:
        checkpoints.save({"student": Tensors(step)}, Progress(step=step, tokens={"sampled": 7 * step}))
    return checkpoints


def resumed(directory: Path) -> tuple[int, float]:
    """Step and tensor of a run that is started again."""
    found = find(directory / "checkpoints")
    assert found is not None
    student = Tensors(-1.0)
    progress = load(found, {"student": student})
    assert progress.tokens == {"sampled": 7 * progress.step}
    return progress.step, float(student.tensor[5])


def names(directory: Path) -> set[str]:
    return {path.name for path in (directory / "checkpoints").iterdir()}


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = write(tmp_path, 10, keep=2)
    checkpoints.mark_best(10)
    for step in (20, 30, 1_000_000, 1_000_010):
        checkpoints.save({"student": Tensors(step)}, Progress(step=step, tokens={"sampled": 7 * step}))
    checkpoints.wait()
    assert names(tmp_path) == {"step-000010", "step-1000000", "step-1000010", "latest", "best"}
    best = checkpoints.best()
    assert best is not None
    assert best.name == "step-000010"
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-1000010"
    assert resumed(tmp_path) == (1_000_010, 1_000_010.0)


def test_a_new_run_has_none(tmp_path: Path) -> None:
    assert find(tmp_path / "checkpoints") is None


def test_the_same_step_is_not_written_twice(tmp_path: Path) -> None:
    """A run that loses its teacher saves once more; the checkpoint that `latest` names is not taken away for that."""
    checkpoints = write(tmp_path, 10)
    before = (tmp_path / "checkpoints" / "step-000010" / "manifest.json").stat().st_ino
    checkpoints.save({"student": Tensors(11.0)}, Progress(step=10))
    assert (tmp_path / "checkpoints" / "step-000010" / "manifest.json").stat().st_ino == before


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5)


DAMAGES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "a bit": (flip, "student/tensor.pt", "checksum"),
    "cut short": (cut, "student/tensor.pt", "bytes in place of"),
    "gone": (Path.unlink, "student/name.txt", "missing"),
    "no manifest": (Path.unlink, "manifest.json", "manifest.json"),
    "half a manifest": (cut, "manifest.json", "Expecting"),
    "another's manifest": (lambda path: path.write_text('{"files": {}}'), "manifest.json", "manifest.json"),
    "progress": (flip, "progress.json", "checksum"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_costs_one_checkpoint_and_is_said(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hurt, file, word = DAMAGES[damage]
    write(tmp_path, 10, 20)
    newest = tmp_path / "checkpoints" / "step-000020"
    hurt(newest / file)
    with caplog.at_level(logging.WARNING):
        assert resumed(tmp_path) == (10, 10.0)
    (line,) = caplog.messages
    assert "step-000020" in line
    assert word in line
    assert "goes on from step-000010" in line
    assert names(tmp_path) == {"step-000010", "step-000020.damaged", "latest"}
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000010"
    caplog.clear()
    assert resumed(tmp_path) == (10, 10.0)
    assert not caplog.messages, "said once"
    # The step is made again, and damaged again: neither is lost.
    write(tmp_path, 20)
    hurt(newest / file)
    assert resumed(tmp_path) == (10, 10.0)
    assert {"step-000020.damaged", "step-000020.damaged-2"} < names(tmp_path)


def test_several_damaged_ones_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path, 10, 20, 30)
    for step in (20, 30):
        flip(tmp_path / "checkpoints" / f"step-0000{step}" / "student" / "tensor.pt")
    assert resumed(tmp_path) == (10, 10.0)


def test_where_none_is_whole_nothing_is_begun_anew(tmp_path: Path) -> None:
    write(tmp_path, 10, 20)
    for step in (10, 20):
        cut(tmp_path / "checkpoints" / f"step-0000{step}" / "student" / "tensor.pt")
    before = names(tmp_path)
    for _ in range(2):  # the second start is told the same
        with pytest.raises(
            NoWholeCheckpoint, match=r"step-000020: student/tensor.pt.*step-000010.*choose another --name"
        ):
            resumed(tmp_path)
        assert names(tmp_path) == before


def test_checkpoints_that_were_taken_away_are_missed(tmp_path: Path) -> None:
    """`latest` says that there was one."""
    write(tmp_path, 10, 20)
    directory = tmp_path / "checkpoints"
    (directory / "step-000020").rename(tmp_path / "elsewhere")
    assert resumed(tmp_path) == (10, 10.0)
    (directory / "step-000010").rename(tmp_path / "elsewhere too")
    with pytest.raises(NoWholeCheckpoint):
        resumed(tmp_path)


def test_a_run_killed_between_the_name_and_latest_goes_on_from_the_one_before(tmp_path: Path) -> None:
    """And the step that was never named comes again in its place."""
    write(tmp_path, 10, 20)
    (tmp_path / "checkpoints" / "latest").write_text("step-000010")
    (tmp_path / "checkpoints" / "step-000030.partial" / "student").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".latest.0a1b2c3d").write_text("step-0000")  # killed while it moved
    assert resumed(tmp_path) == (10, 10.0)
    assert names(tmp_path) == {"step-000010", "step-000020", "latest"}
    checkpoints = write(tmp_path)
    checkpoints.save({"student": Tensors(21.0)}, Progress(step=20, tokens={"sampled": 140}))
    assert resumed(tmp_path) == (20, 21.0)


def test_what_latest_names_stays_where_a_later_step_was_never_named(tmp_path: Path) -> None:
    """Killed between the name of step 50 and `latest`, a run goes on from 20 and is stopped at 30, with one to keep."""
    write(tmp_path, 20, 50, keep=10)
    (tmp_path / "checkpoints" / "latest").write_text("step-000020")
    write(tmp_path, 30, keep=1)
    assert resumed(tmp_path) == (30, 30.0)
    write(tmp_path, 50, keep=1)
    assert names(tmp_path) == {"step-000050", "latest"}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing more than `size` bytes into a file fails, as on a full disk (EFBIG in place of ENOSPC)."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, ignored)


def test_what_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    checkpoints = write(tmp_path, 10)
    with largest_file(100_000), pytest.raises(CheckpointFailed, match=r"step 20 could not be written.*File too large"):
        checkpoints.save({"student": Tensors(20.0, size=100_000)}, Progress(step=20))
    assert names(tmp_path) == {"step-000010", "latest"}
    assert resumed(tmp_path) == (10, 10.0)
    # When there is room again, the next one is written.
    checkpoints.save({"student": Tensors(30.0)}, Progress(step=30, tokens={"sampled": 210}))
    assert resumed(tmp_path) == (30, 30.0)


def test_in_the_background_it_is_the_state_of_its_step(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig(asynchronous=True))
    student = Tensors(10.0, size=5_000_000)
    checkpoints.save({"student": student}, Progress(step=10, tokens={"sampled": 70}))
    student.tensor.fill_(11.0)  # the next update comes while it is written
    checkpoints.mark_best(10)
    assert resumed(tmp_path) == (10, 10.0)
    with largest_file(100_000):
        checkpoints.save({"student": Tensors(20.0, size=100_000)}, Progress(step=20))
        with pytest.raises(CheckpointFailed, match="step 20 could not be written"):
            checkpoints.wait()
    checkpoints.wait()  # said once
    checkpoints.save({"student": Tensors(20.0)}, Progress(step=20, tokens={"sampled": 140}))
    checkpoints.wait()
    assert resumed(tmp_path) == (20, 20.0)


def test_whatever_fails_in_the_background_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that is gone, say: else the run would finish without its last checkpoints, and nobody would know."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig(asynchronous=True))

    def lost(*_: Any) -> list[str]:
        raise RuntimeError("Connection closed by peer")

    with monkeypatch.context() as patched:
        patched.setattr(distributed, "gather_strings", lost)
        checkpoints.save({"student": Tensors(10.0)}, Progress(step=10))
        with pytest.raises(RuntimeError, match="closed by peer"):
            checkpoints.wait()
    checkpoints.save({"student": Tensors(10.0)}, Progress(step=10, tokens={"sampled": 70}))
    checkpoints.wait()
    assert resumed(tmp_path) == (10, 10.0)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_how_long_it_took_is_until_it_is_written(
    asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of a job has to leave room for all of it, not for a copy in memory."""

    def slow(path: Path, state: Any) -> Any:
        time.sleep(0.2)
        return write_state(path, state)

    monkeypatch.setattr(checkpoints_module, "write_state", slow)
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig(asynchronous=asynchronous))
    checkpoints.save({"student": Tensors(10.0)}, Progress(step=10))
    checkpoints.wait()
    assert checkpoints.seconds >= 0.6, "three files"


def test_a_best_one_that_was_never_written_does_not_push_out_the_one_before(tmp_path: Path) -> None:
    """checkpoint.on_error: continue; the next start marks the best step again."""
    checkpoints = write(tmp_path, 10, keep=1)
    checkpoints.mark_best(10)
    with largest_file(100_000), pytest.raises(CheckpointFailed):
        checkpoints.save({"student": Tensors(20.0, size=100_000)}, Progress(step=20))
    checkpoints = write(tmp_path, keep=1)
    checkpoints.mark_best(20)
    checkpoints.save({"student": Tensors(30.0)}, Progress(step=30))
    assert checkpoints.best() == tmp_path / "checkpoints" / "step-000010"


def test_every_file_of_lines_is_on_disk_before_a_checkpoint_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the validations too: after a power cut none may lack a step that the checkpoint holds."""
    (tmp_path / "eval").mkdir()
    lines = [tmp_path / "metrics.jsonl", tmp_path / "eval" / "validation.jsonl"]
    for file in lines:
        file.write_text("{}\n")
    synced: list[Path] = []
    monkeypatch.setattr(checkpoints_module, "sync", synced.append)
    write(tmp_path, 10)
    assert set(lines) <= set(synced)


def test_a_file_system_that_does_not_sync_names_keeps_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As FUSE and CIFS may; what is in a file has to be forced to disk."""
    fsync = os.fsync

    def refuse(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").resolve().is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    write(tmp_path, 10)
    assert resumed(tmp_path) == (10, 10.0)


def test_the_manifest_says_what_is_there(tmp_path: Path) -> None:
    write(tmp_path, 10)
    directory = tmp_path / "checkpoints" / "step-000010"
    manifest = json.loads((directory / "manifest.json").read_text())
    found = {str(p.relative_to(directory)): p.stat().st_size for p in directory.rglob("*") if p.is_file()}
    assert {name: entry["size"] for name, entry in manifest["files"].items()} | {
        "manifest.json": found["manifest.json"]
    } == found
    assert (manifest["step"], manifest["world_size"]) == (10, 1)
    assert manifest["versions"]["torch"] == torch.__version__


def test_the_format_has_a_number(tmp_path: Path) -> None:
    """An older checkpoint is read; a newer one is refused in a line, and neither renamed nor passed over."""
    write(tmp_path, 10, 20)
    manifest = tmp_path / "checkpoints" / "step-000020" / "manifest.json"
    values = json.loads(manifest.read_text())
    assert values.pop("format") == 2
    manifest.write_text(json.dumps(values))
    assert resumed(tmp_path) == (20, 20.0), "format 1 had no number"
    manifest.write_text(json.dumps(values | {"format": 3, "something": "new"}))
    with pytest.raises(
        ValueError, match=r"step-000020 is a checkpoint of format 3, and this version reads 2 and older"
    ):
        resumed(tmp_path)
    assert names(tmp_path) == {"step-000010", "step-000020", "latest"}
