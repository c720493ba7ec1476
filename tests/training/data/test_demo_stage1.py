"""The demo's student after stage 1, kept and made anew."""

from __future__ import annotations

from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from configs.schema import RunConfig
from training.data.demo import resolve


@pytest.mark.parametrize("finished", [True, False])
def test_a_deleted_student_is_trained_anew_and_an_unfinished_one_gone_on_with(
    finished: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run of a student that was deleted would only give the same weights again."""

    def train(command: list[str], **_: Any) -> CompletedProcess[str]:
        flags = dict(zip(command[2::2], command[3::2], strict=True))
        run = Path(flags["--runs_dir"]) / flags["--name"]
        went_on.append((run / "checkpoints").is_dir())
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        if finished or len(went_on) > 1:
            (run / "summary.json").write_text("{}")
            Path(flags["--sft.output"]).mkdir()
        return CompletedProcess(command, 0 if finished or len(went_on) > 1 else 75)

    went_on: list[bool] = []
    monkeypatch.setattr(resolve.subprocess, "run", train)
    for _ in range(2):
        try:
            resolve._stage1(RunConfig(), tmp_path / "student-base", {}).rmdir()
        except SystemExit:
            assert not finished
    assert went_on == [False, not finished]
