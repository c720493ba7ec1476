"""Files of lines that grow with a run, and locks, on whatever file system they are."""

from __future__ import annotations

import errno
import fcntl
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from configs.io.files import locked
from configs.io.lines import cut_behind, whole_rows


def lines(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_what_stays_of_a_long_file_is_not_written_again(tmp_path: Path) -> None:
    """Each start of a run cuts off what was logged past its checkpoint: the file is the same one, and a reader that has
    it open sees it end."""
    row = json.dumps({"step": 1, "said": "á\u2028ø\r í"}, ensure_ascii=False)
    file = lines(tmp_path / "metrics.jsonl", f'{row}\n{row}\n{{"step": 2}}\n{{"step": 3}}\n{{"step": 4, "lo')
    number, reader = file.stat().st_ino, file.open("rb")
    cut_behind(file, lambda row: row["step"] <= 2)
    assert (file.stat().st_ino, reader.read()) == (number, f'{row}\n{row}\n{{"step": 2}}\n'.encode())
    cut_behind(file, lambda row: row["step"] <= 1)
    assert [one["said"] for one in whole_rows(file)] == ["á\u2028ø\r í"] * 2
    cut_behind(file, lambda row: False)
    assert file.read_bytes() == b""
    cut_behind(file, lambda row: False)


def test_rows_are_read_one_at_a_time(tmp_path: Path) -> None:
    """A run's samples may be gigabytes."""
    file = lines(tmp_path / "samples.jsonl", "half a li\n\n[1]\n" + f'{{"said": "{"á" * 500}"}}\n' * 4000)
    tracemalloc.start()
    try:
        assert sum(1 for _ in whole_rows(file)) == 4000
        cut_behind(file, lambda row: True)
        assert tracemalloc.get_traced_memory()[1] < file.stat().st_size // 10
    finally:
        tracemalloc.stop()
    assert list(whole_rows(tmp_path / "nowhere")) == []


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lustre that is mounted without `flock`: processes of one machine wait for each other all the same."""
    real = fcntl.flock
    taken: list[str] = []

    def flock(file: Any, operation: int) -> None:
        if str(tmp_path / "shared") in file.name:
            raise OSError(errno.ENOSYS, "Function not implemented")
        real(file, operation)
        taken.append(file.name)

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "shared").mkdir()
    with locked(tmp_path / "shared" / ".lock"):
        (name,) = taken
        with Path(name).open("w") as other, pytest.raises(BlockingIOError):
            real(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with Path(name).open("w") as other:
        real(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with locked(tmp_path / "shared" / "another.lock"):
        assert len(set(taken)) == 2
