"""What every program of eval/ says of a mistake: one line, exit code 2, no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval import compare, heldout, measure, report, run_euroeval, run_experiment
from eval.cli import exit_code
from eval.experiments import openings
from tests.support.compare_files import write_run

MAINS = (compare, heldout, measure, report, run_euroeval, run_experiment, openings)


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert [exit_code(lambda: 75), exit_code(lambda: None), exit_code(lambda: ["x"])] == [75, 0, 0]

    def fails(error: Exception) -> int:
        raise error

    assert exit_code(lambda: fails(ValueError("--run x:\n  no such\tfolder"))) == 2
    assert capsys.readouterr().err == "error: --run x: no such folder\n"
    assert exit_code(lambda: fails(PermissionError(13, "Permission denied", "/runs"))) == 2
    assert capsys.readouterr().err == "error: [Errno 13] Permission denied: '/runs'\n"
    with pytest.raises(KeyError):  # a fault of ours is no mistake of the user's
        exit_code(lambda: fails(KeyError("x")))


@pytest.mark.parametrize("program", MAINS, ids=lambda program: program.__name__)
def test_help_is_the_docstring(program: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        program.main(["--help"])  # type: ignore[attr-defined]
    assert ended.value.code == 0
    assert (program.__doc__ or "").strip() in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Results that have nowhere to go were a traceback."""
    run = write_run(tmp_path, "one", str(tmp_path / "start"))
    (tmp_path / "file").touch()
    (run / "plots").touch()
    text = tmp_path / "text.txt"
    text.write_text("Hetta er ein setningur.\n" * 2)
    for program, arguments in (
        (report, ["--run", str(run)]),
        (compare, ["--run", str(run), "--out", str(tmp_path / "file" / "out")]),
        (openings, [str(text), str(tmp_path / "file" / "out"), "--heldout", "0"]),
    ):
        assert program.main(arguments) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
