"""A model directory is replaced in one move, and a start that was killed leaves none behind for good."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.student.export import replace_directory


def whole(fresh: Path) -> None:
    (fresh / "model").write_text("whole")


def full(fresh: Path) -> None:
    (fresh / "model").write_text("half")
    raise OSError("No space left on device")


def test_what_a_killed_start_left_is_removed(tmp_path: Path) -> None:
    """It is as large as the model; that of another export, which may be under way, is not touched."""
    for name in (".export.export-a1b2c3d4", ".export.v2.export-a1b2c3d4"):
        (tmp_path / name / "new").mkdir(parents=True)
    replace_directory(tmp_path / "export", whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".export.v2.export-a1b2c3d4", "export"]


def test_what_fails_leaves_the_one_before(tmp_path: Path) -> None:
    replace_directory(tmp_path / "export", whole)
    with pytest.raises(OSError, match="No space left"):
        replace_directory(tmp_path / "export", full)
    assert (tmp_path / "export" / "model").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
