"""Each heavy library has one home (docs/architecture.md); the doors between rooms are import-linter's contracts."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("configs", "inference", "rewards", "training", "eval")
HOMES = {
    "deepspeed": {"training/actor.py", "training/critic.py", "training/deepspeed_engine.py"},
    "megatron": {"inference/teacher.py", "inference/weights.py"},
    "euroeval": "eval/",
}


def imported_libraries(file: Path) -> set[str]:
    """Top-level names that a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def files_importing(library: str) -> set[str]:
    files = (file for room in ROOMS for file in (ROOT / room).rglob("*.py"))
    return {str(file.relative_to(ROOT)) for file in files if library in imported_libraries(file)}


@pytest.mark.parametrize("library", HOMES)
def test_heavy_library_has_one_home(library: str) -> None:
    home = HOMES[library]
    strays = {
        file
        for file in files_importing(library)
        if not (file.startswith(home) if isinstance(home, str) else file in home)
    }
    assert strays == set()


def test_imports_are_seen(tmp_path: Path) -> None:
    """The test above would be silent if it looked at the wrong thing."""
    file = tmp_path / "x.py"
    file.write_text("import deepspeed.comm as c\ndef f():\n    from megatron.core import x\nfrom . import euroeval\n")
    assert imported_libraries(file) == {"deepspeed", "megatron"}
    assert files_importing("torch")


def test_configs_and_answers_need_no_torch() -> None:
    assert not {"torch", "transformers"} & imported_libraries(ROOT / "configs" / "schema.py")
    assert not {"torch", "transformers"} & imported_libraries(ROOT / "rewards" / "answers.py")


def test_no_other_rooms() -> None:
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))}
    assert folders <= {*ROOMS, "slurm", "docs", "tests", "runs"}


@pytest.mark.parametrize(
    "file", sorted(str(f.relative_to(ROOT)) for room in ROOMS for f in (ROOT / room).rglob("*.py"))
)
def test_files_and_functions_are_short(file: str) -> None:
    """Files under 400 lines, functions under 80 (but for the loop, which shows its phases as calls)."""
    text = (ROOT / file).read_text(encoding="utf-8")
    assert len(text.splitlines()) < 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and file != "training/loop.py":
            assert (node.end_lineno or 0) - node.lineno < 80, f"{file}:{node.lineno} {node.name}"
