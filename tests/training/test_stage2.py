"""What stage 2 asks of a server that it has not started itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from configs.io.results import Result, Value
from configs.schema import RunConfig, TeacherConfig
from inference.model.output_layer import output_layer_hash
from tests.support.teacher_models import build
from training import distributed
from training.data.preflight import check_interfaces
from training.run import launcher
from training.run.run_folder import RunFolder
from training.stage2 import evaluation_once
from training.teacher.connect import check_served_model


def test_ranks_that_cannot_be_one_run_are_told_so_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """srun alone starts as many runs as tasks; ranks on several machines do not reach a teacher on loopback."""
    for name in ("RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(ValueError, match="SLURM_STEP_NUM_TASKS = 4: each of srun's tasks would be a run of its own"):
        launcher.check_launcher()
    for started_by in ("SLURM_PTY_PORT", "RANK"):
        with monkeypatch.context() as patch:
            patch.setenv(started_by, "1")
            launcher.check_launcher()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert not launcher.several_machines()  # nobody says how many are here
    monkeypatch.setenv("LOCAL_SIZE", "2")
    assert launcher.several_machines()
    here, there = TeacherConfig(), TeacherConfig(interface="10.0.0.1")
    for teacher, machines in ((here, False), (there, True), (TeacherConfig(address="h:1"), True)):
        check_interfaces(RunConfig(teacher=teacher), several_machines=machines)
    with pytest.raises(ValueError, match=r"teacher\.interface = '127\.0\.0\.1': only this machine reaches it"):
        check_interfaces(RunConfig(), several_machines=True)


def test_a_server_started_again_with_another_model_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its hidden states with the output layer of teacher.path would be no model's distribution."""
    for seed in range(2):
        build("llama", tmp_path / f"teacher-{seed}", seed)

    def check(model: Path, dtype: str = "float32", *, address: str | None = "host:1", output_layer: str = "") -> None:
        layer = output_layer or output_layer_hash(model)
        info = SimpleNamespace(model=model.name, dtype=dtype, output_layer=layer)
        facts = SimpleNamespace(path=tmp_path / "teacher-0")
        link: Any = SimpleNamespace(client=SimpleNamespace(info=lambda: info), facts=facts)
        check_served_model("teacher", TeacherConfig(address=address), link)

    check(tmp_path / "teacher-0")
    check(tmp_path / "teacher-1", address=None)  # our own
    check(tmp_path / "teacher-1", output_layer="none")  # it does not say
    assert not caplog.messages
    with pytest.raises(ValueError, match=r"^teacher\.path = '.*teacher-0': host:1 serves another model, 'teacher-1'"):
        check(tmp_path / "teacher-1")
    check(tmp_path / "teacher-0", "bfloat16")
    assert caplog.messages == ["teacher.dtype = 'float32': host:1 computes in bfloat16"]


def test_rank_0_says_whether_an_evaluation_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over NFS another rank may not see the file yet. Alone it would wait for ever, and measure a student that has
    learnt for the one before."""
    asked: list[str] = []

    def evaluate() -> Result:
        asked.append("again")
        named: dict[str, Any] = {"data": {}, "settings": {}, "versions": {}}
        return Result(measure="heldout", model="m", **named, values={"f1": Value(1.0)})

    for _ in range(2):
        assert evaluation_once(RunFolder(tmp_path), "before", evaluate) == {"f1": 1.0}
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    assert evaluation_once(RunFolder(tmp_path / "lags"), "before", evaluate) == {}
    assert asked == ["again"]
