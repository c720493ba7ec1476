"""A run goes on with the data that it was started with: what is in the files counts, not when they were written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.schema import (
    DataConfig,
    EvalConfig,
    ExtraTeacherConfig,
    RunConfig,
    SamplingConfig,
    StudentConfig,
    TeacherConfig,
)
from tests.support.runs import metrics
from training.run.resuming import check_settings, start_afresh
from training.run.run_folder import RunFolder


def rows(path: Path, *words: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"question": w, "answers": [w], "text": w}) + "\n" for w in words))
    return path


def rewritten(path: Path) -> None:
    rows(path, "nakað", "annað")


def one_more(path: Path) -> None:
    path.write_text(path.read_text() + path.read_text())


def of_the_same_size_and_time(path: Path) -> None:
    before = path.stat()
    path.write_text(path.read_text().replace("eitt", "ivar"))
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def beside(path: Path) -> None:
    rows(path.parent / "more.jsonl", "meira")


@pytest.fixture
def started(tmp_path: Path) -> tuple[RunFolder, RunConfig]:
    """The folder of a run with a checkpoint, and its settings."""
    names = ("prompts", "warmup", "heldout", "validation")
    files = {name: str(rows(tmp_path / f"{name}.jsonl", "eitt", "tvey", name)) for name in names}
    rows(tmp_path / "text" / "a.jsonl", "eitt")
    config = RunConfig(data=DataConfig(**files, text=str(tmp_path / "text")))
    folder = RunFolder(tmp_path / "run")
    start_afresh(folder, config)
    (folder.checkpoints / "step-000002").mkdir(parents=True)
    check_settings(folder, config)
    return folder, config


@pytest.mark.parametrize("name", ["prompts", "warmup", "heldout", "validation", "text"])
@pytest.mark.parametrize("change", [rewritten, one_more, of_the_same_size_and_time, beside])
def test_other_content_is_refused_and_the_old_one_is_taken_back(
    name: str, change: Callable[[Path], None], started: tuple[RunFolder, RunConfig], tmp_path: Path
) -> None:
    folder, config = started
    file = tmp_path / "text" / "a.jsonl" if name == "text" else tmp_path / f"{name}.jsonl"
    if change is beside and name != "text":
        beside(file)
        check_settings(folder, config)  # not of this data
        return
    before = file.read_bytes()
    change(file)
    with pytest.raises(ValueError, match=rf"^data\.{name} = .*put the old file back, or choose another --name$"):
        check_settings(folder, config)
    (tmp_path / "text" / "more.jsonl").unlink(missing_ok=True)
    file.unlink()
    file.write_bytes(before)
    check_settings(folder, config)


def test_a_copy_elsewhere_is_another_setting(started: tuple[RunFolder, RunConfig], tmp_path: Path) -> None:
    folder, config = started
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(Path(config.data.prompts).read_bytes())
    with pytest.raises(ValueError, match=r"data\.prompts: .* then, .* now"):
        check_settings(folder, replace(config, data=replace(config.data, prompts=str(copy))))


@pytest.mark.parametrize(
    "changed",
    [
        {"eval": EvalConfig(batch=1)},
        {"sampling": SamplingConfig(prompts_at_once=1)},
        {"student": StudentConfig(gradient_checkpointing=True)},
        {"teacher": TeacherConfig(tensor_parallel=4, max_batch_tokens=1, max_cache_tokens=1, logit_chunk=1)},
        {"teacher": TeacherConfig(devices="0")},
        {"teacher": TeacherConfig(url="http://another-node:8000/v1")},
    ],
)
def test_what_helps_where_memory_runs_out_or_a_node_changes_may_differ(
    changed: dict[str, Any], started: tuple[RunFolder, RunConfig]
) -> None:
    folder, config = started
    check_settings(folder, replace(config, **changed))


def retrained(model: Path) -> None:
    """One number in the middle of the weights; size and time of the file as before."""
    file = model / "model.safetensors"
    before = file.stat()
    tensors = load_file(file)
    tensors["middle"][500_000] += 1.0
    save_file(tensors, file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("name", ["student", "teacher", "teachers"])
def test_models_that_were_trained_on_are_refused(
    name: str, started: tuple[RunFolder, RunConfig], tmp_path: Path
) -> None:
    """The reference and an adapter's frozen weights are read from student.path at each start."""
    folder, config = started
    for path in ("student", "teacher", "teachers"):
        (tmp_path / path).mkdir()
        tensors = {"a": torch.zeros(10), "middle": torch.zeros(900_000), "z": torch.zeros(9)}
        save_file(tensors, tmp_path / path / "model.safetensors")
    config = replace(
        config,
        student=StudentConfig(path=str(tmp_path / "student")),
        teacher=TeacherConfig(path=str(tmp_path / "teacher")),
        teachers=(ExtraTeacherConfig(name="b", path=str(tmp_path / "teachers")),),
    )
    start_afresh(folder, config)
    (tmp_path / "student" / "README.md").write_text("a card")
    check_settings(folder, config)
    retrained(tmp_path / name)
    with pytest.raises(ValueError, match=rf"^{name}(\[0\])?\.path = .*put the old model back, or choose another"):
        check_settings(folder, config)


def test_a_run_of_another_stage_is_refused(started: tuple[RunFolder, RunConfig]) -> None:
    """Stage 2 would go on from the optimizer's state after stage 1, with a reference from before it."""
    folder, config = started
    start_afresh(folder, config, 1)
    check_settings(folder, config, 1)
    with pytest.raises(ValueError, match=r"^name = 'run': .*run is a run of stage 1; choose another --name$"):
        check_settings(folder, config)


def test_a_real_run_is_not_gone_on_with(tmp_path: Path, train: Callable[..., Any]) -> None:
    asked = rows(tmp_path / "prompts.jsonl", *(f"Hvar er bygdin {n}?" for n in range(20)))
    options = ["--data.prompts", str(asked), "--checkpoint.every", "1", "--eval.questions", "2"]
    train(tmp_path / "runs", *options, "--steps", "1")
    asked.write_text(asked.read_text().replace("Hvar", "Hví"))
    done = train(tmp_path / "runs", *options, "--steps", "2", code=2)
    (said,) = [row for row in done.stderr.splitlines() if row.startswith("error")]
    assert f"data.prompts = {str(asked)!r}: not what it was when" in said
    assert len(metrics(tmp_path / "runs" / "grpo-minillm")) == 1


@pytest.mark.parametrize(
    "changed",
    [
        {"teachers": (ExtraTeacherConfig(name="another", path="models/another"),)},
        {"student": StudentConfig(chat_template_kwargs={"enable_thinking": False, "tools": ["a"]})},
    ],
)
def test_a_run_with_lists_and_mappings_goes_on_with_the_same_ones_only(
    changed: dict[str, Any], started: tuple[RunFolder, RunConfig]
) -> None:
    folder, without = started
    config = replace(without, **changed)
    with pytest.raises(ValueError, match=r"was started with other settings"):
        check_settings(folder, config)
    start_afresh(folder, config)
    check_settings(folder, config)
    with pytest.raises(ValueError, match=r"was started with other settings"):
        check_settings(folder, without)
