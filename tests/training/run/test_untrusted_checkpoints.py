"""A checkpoint that was tampered with, checksums and all, runs no program when a run goes on from it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from tests.support.forked import finish_forked
from tests.support.runs import command
from tests.training.run.test_checkpoints import names, resumed, write


class Runs:
    """Unpickling it calls `function(*arguments)`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def shell(marker: Path) -> Any:
    return {"module": {"weight": torch.ones(3)}, "extra": Runs(os.system, f"touch {marker}")}


def evaluated(marker: Path) -> Any:
    return [Runs(eval, f"open({str(marker)!r}, 'w')")]


def loaded_anew(marker: Path) -> Any:
    """A pickle within: what is allowed must not lead to what is not."""
    return {"inner": Runs(pickle.loads, pickle.dumps(Runs(os.system, f"touch {marker}")))}


ATTACKS = [shell, evaluated, loaded_anew]


def forge(checkpoint: Path, name: str, content: Any, protocol: int = 2) -> None:
    """Put another file in the place of one of a checkpoint's, with a manifest that agrees."""
    path = checkpoint / name
    torch.save(content, path, pickle_protocol=protocol)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    data = path.read_bytes()
    manifest["files"][name] = {"size": len(data), "xxh3": xxhash.xxh3_128(data).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("attack", ATTACKS)
def test_it_counts_as_damaged(attack: Callable[[Path], Any], protocol: int, tmp_path: Path) -> None:
    write(tmp_path, 10, 20)
    forge(tmp_path / "checkpoints" / "step-000020", "student/tensor.pt", attack(tmp_path / "ran"), protocol)
    assert resumed(tmp_path) == (10, 10.0)
    assert "step-000020.damaged" in names(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_nothing_but_an_archive_of_torch_is_read(tmp_path: Path) -> None:
    write(tmp_path, 10, 20, 30, 40)
    newest = tmp_path / "checkpoints"
    with zipfile.ZipFile(newest / "step-000040" / "student" / "tensor.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02cos\nsystem\n")
    for step, content in (("20", b""), ("30", pickle.dumps(Runs(os.system, f"touch {tmp_path}/ran")))):
        (newest / f"step-0000{step}" / "student" / "tensor.pt").write_bytes(content)
    for step in ("20", "30", "40"):
        manifest = json.loads((newest / f"step-0000{step}" / "manifest.json").read_text())
        data = (newest / f"step-0000{step}" / "student" / "tensor.pt").read_bytes()
        manifest["files"]["student/tensor.pt"] = {"size": len(data), "xxh3": xxhash.xxh3_128(data).hexdigest()}
        (newest / f"step-0000{step}" / "manifest.json").write_text(json.dumps(manifest))
    assert resumed(tmp_path) == (10, 10.0)
    assert not (tmp_path / "ran").exists()


def test_a_run_refuses_it_in_a_line(finished_run: Path, tmp_path: Path, demo_cache: Path) -> None:
    """Real files of DeepSpeed: model and optimizer states."""
    run = tmp_path / "grpo-minillm"
    run.mkdir()
    shutil.copy(finished_run / "config.yaml", run)  # in the rest of the folder another test may be writing
    shutil.copytree(finished_run / "checkpoints", run / "checkpoints")
    for checkpoint in (run / "checkpoints").glob("step-*"):
        for file in (checkpoint / "student").glob("*.pt"):
            states = torch.load(file, weights_only=False, map_location="cpu")
            states["client_state"] = Runs(os.system, f"touch {tmp_path}/ran")
            forge(checkpoint, f"student/{file.name}", states)
    done = finish_forked(command(tmp_path, demo_cache, "--steps", "4", "--checkpoint.every", "2"), code=2)
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error"))
    assert "no data, so reading it could run a program" in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "ran").exists()


def test_deepspeeds_own_reading_takes_data_only(tmp_path: Path) -> None:
    """DeepSpeed asks for weights_only=False; what the check above may miss is refused there."""
    from training.student.deepspeed_engine import TorchCheckpointEngine

    torch.save(shell(tmp_path / "ran"), tmp_path / "states.pt")
    with pytest.raises(pickle.UnpicklingError):
        TorchCheckpointEngine().load(str(tmp_path / "states.pt"))
    assert not (tmp_path / "ran").exists()
