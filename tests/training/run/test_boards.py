"""What a run shows on TensorBoard, W&B and MLflow; a board that fails is not the run's end.

W&B and MLflow are no dependency: where they are not installed, small modules with the few calls that are made stand in
for them; where they are, the last tests write to the real ones, offline.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from training.run import boards
from training.run.boards import Boards, board_names
from training.run.run_folder import RunFolder

REAL = {name: importlib.util.find_spec(name) is not None for name in ("wandb", "mlflow")}


class FakeWandB(ModuleType):
    """Of wandb what is called: init, log, finish."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[dict[str, Any]] = []
        self.shown: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, **settings: Any) -> Any:
        self.runs.append(settings)
        return SimpleNamespace(
            log=lambda values, step: self.shown.append((step, values)),
            finish=lambda: setattr(self, "finished", self.finished + 1),
        )


class FakeMLflow(ModuleType):
    """Of mlflow what is called; its server names the runs."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.calls: list[tuple[Any, ...]] = []

    def set_experiment(self, name: str) -> None:
        self.calls.append(("experiment", name))

    def start_run(self, run_id: str | None, run_name: str | None) -> Any:
        self.calls.append(("run", run_id, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "from-the-server"))

    def log_artifact(self, file: str) -> None:
        self.calls.append(("file", Path(file).name))

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        self.calls.append(("metrics", step, values))

    def end_run(self) -> None:
        self.calls.append(("end",))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = tmp_path / "a-run"
    run.mkdir()
    (run / "config.yaml").write_text("algo: grpo\nactor: {learning_rate: 0.001}\n")
    return run


def test_one_line_where_a_package_is_missing_or_a_name_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else object())
    assert board_names("none") == []
    assert board_names("tensorboard, mlflow") == ["tensorboard", "mlflow"]
    with pytest.raises(
        ValueError, match=r"^report_to = 'wandb': the package wandb is not installed; pip install wandb$"
    ):
        board_names("wandb")
    with pytest.raises(
        ValueError, match=r"^report_to = 'comet': use tensorboard, wandb, mlflow with commas between, or"
    ):
        board_names("comet")


def test_wandb_gets_the_numbers_and_a_resumed_run_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run = RunFolder(folder, ["wandb"])
    run.append_metrics({"step": 1, "reward/mean": -2.5})
    again = RunFolder(folder, ["wandb"])  # another start of the same run
    again.append_metrics({"step": 2, "reward/mean": -2.0})
    again.boards.close()
    assert wandb.shown == [(1, {"reward/mean": -2.5}), (2, {"reward/mean": -2.0})]
    first, second = wandb.runs
    assert first["id"] == second["id"]
    assert first["resume"] == "allow"
    assert (first["project"], first["name"]) == ("grpo-kd", "a-run")
    assert first["config"] == {"algo": "grpo", "actor": {"learning_rate": 0.001}}
    assert wandb.finished == 1
    assert (folder / "metrics.jsonl").read_text().count("\n") == 2


def test_mlflow_names_the_run_and_a_resumed_one_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = FakeMLflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    for step in (1, 2):
        board = Boards(folder, ["mlflow"])
        board.log({"reward/mean": 0.5}, step)
    board.close()
    assert mlflow.calls == [
        ("experiment", "grpo-kd"), ("run", None, "a-run"), ("file", "config.yaml"),
        ("metrics", 1, {"reward/mean": 0.5}),
        ("experiment", "grpo-kd"), ("run", "from-the-server", None), ("metrics", 2, {"reward/mean": 0.5}), ("end",),
    ]  # fmt: skip


def test_a_board_that_fails_is_left_or_opened_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened: list[int] = []

    def moody(folder: Path, step: int) -> boards.Board:
        opened.append(step)
        if step == 4:
            raise OSError("no network")
        return boards.Board(log, lambda: None)

    def log(values: Mapping[str, float], step: int) -> None:
        if step in (2, 3):
            raise OSError("disk full")

    monkeypatch.setitem(boards.BOARDS, "moody", moody)
    now = 1e5
    monkeypatch.setattr(time, "monotonic", lambda: now)
    board = Boards(folder, ["moody"])
    for step in range(1, 7):
        board.log({"a": 1.0}, step)
    assert opened == [1, 3, 4]  # again after each failure to write, and an hour after a failure to open
    now += boards.RETRY_S
    board.log({"a": 1.0}, 7)
    assert opened == [1, 3, 4, 7]
    assert [record.getMessage() for record in caplog.records] == [
        "report_to: moody does not take step 2 (disk full)",
        "report_to: moody does not take step 3 (disk full)",
        "report_to: moody does not take step 4 (no network)",
    ]


def test_a_board_that_cannot_be_closed_is_no_failure_of_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its server is gone when the run has finished; the other boards are closed all the same."""
    closed: list[str] = []

    def close() -> None:
        raise OSError("no network")

    monkeypatch.setitem(boards.BOARDS, "one", lambda *_: boards.Board(lambda *_: None, lambda: closed.append("one")))
    monkeypatch.setitem(boards.BOARDS, "gone", lambda *_: boards.Board(lambda *_: None, close))
    board = Boards(folder, ["one", "gone"])
    board.log({"a": 1.0}, 1)
    board.close()
    assert closed == ["one"]
    assert [record.getMessage() for record in caplog.records] == ["report_to: gone cannot be closed (no network)"]


@pytest.mark.skipif(not REAL["wandb"], reason="wandb is not installed")
def test_the_real_wandb_offline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for step in (1, 2):
        board = Boards(folder, board_names("wandb"))
        board.log({"reward/mean": float(step)}, step)
        board.close()
    files = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    name = json.loads((folder / "boards.json").read_text())["wandb"]
    assert [file.name for file in files] == [f"run-{name}.wandb"] * 2
    assert all(b"reward/mean" in file.read_bytes() for file in files)


@pytest.mark.skipif(not REAL["mlflow"], reason="mlflow is not installed")
def test_the_real_mlflow_in_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    store = f"sqlite:///{folder}/mlflow.db"
    try:
        mlflow.set_tracking_uri(store)
        mlflow.MlflowClient()
    except Exception:  # the skinny package has no database
        store = folder.as_uri()
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        mlflow.set_tracking_uri(store)
    for step in (1, 2):
        board = Boards(folder, board_names("mlflow"))
        board.log({"reward/mean": float(step)}, step)
        board.close()
    name = json.loads((folder / "boards.json").read_text())["mlflow"]
    history = mlflow.MlflowClient().get_metric_history(name, "reward/mean")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 2.0)]
