"""`--doctor --cluster`: two ranks of one machine as two nodes, sound and each with one thing wrong."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.support.forked import Forked
from tests.support.runs import ROOT, finish, free_port
from training.tools.cluster import alike

PROGRAM = [sys.executable, str(ROOT / "training" / "main.py"), "--doctor", "--cluster"]
EVERY = {"nodes", "versions", "collectives", "shared files", "teacher port", "limits", "clocks"}


def two_ranks(folder: Path, *flags: list[str]) -> tuple[list[int], dict[str, tuple[str, str]]]:
    """Exit codes, and of each line of rank 0 the verdict and text. `flags`: of each; outputs go to `folder`."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    outputs = [folder / f"rank{rank}" for rank in range(2)]
    processes = [
        Forked([*PROGRAM, *more], out, out.with_suffix(".err"), **shared, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank, (out, more) in enumerate(zip(outputs, flags, strict=True))
    ]
    codes = [process.wait(300) for process in processes]
    found = re.findall(r"^(\S.{13}) (pass|FAIL|skipped:) (.+)$", outputs[0].read_text(), flags=re.MULTILINE)
    return codes, {name.strip(): (word, text) for name, word, text in found}


@pytest.fixture
def said(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("said")


def test_two_sound_ranks_pass(tmp_path: Path, said: Path) -> None:
    flags = ["--runs_dir", str(tmp_path / "runs"), "--cache_dir", str(tmp_path / "cache")]
    codes, lines = two_ranks(said, flags, flags)
    assert codes == [0, 0]
    assert set(lines) == EVERY
    assert {word for word, _ in lines.values()} == {"pass"}
    assert re.search(r"gloo adds up 64 MiB at [\d.]+ GB/s", lines["collectives"][1])
    assert lines["nodes"][1].startswith("2 ranks: 2 on ")
    assert not [file for file in tmp_path.rglob("*") if file.is_file()], "nothing is left behind"


def test_folders_that_are_not_shared_and_an_address_that_is_nobodys_fail(tmp_path: Path, said: Path) -> None:
    (tmp_path / "file").write_text("")
    ranks = [
        ["--runs_dir", str(tmp_path / "runs"), "--cache_dir", str(tmp_path / name), "--teacher.interface", "192.0.2.1"]
        for name in ("cache", "file")  # the second is no folder
    ]
    codes, lines = two_ranks(said, *ranks)
    assert codes == [1, 1]
    assert {name for name, (word, _) in lines.items() if word == "FAIL"} == {"shared files", "teacher port"}
    assert re.match(r"cache_dir: \S+ cannot write .*; choose folders on a file system", lines["shared files"][1])
    assert "teacher.interface = 192.0.2.1, teacher.port = 0: Cannot assign" in lines["teacher port"][1]


def test_one_rank_has_nobody_to_talk_to(tmp_path: Path) -> None:
    done = finish([*PROGRAM, "--runs_dir", str(tmp_path / "r"), "--cache_dir", str(tmp_path / "c")])
    assert "collectives    skipped: one rank has nobody to talk to" in done.stdout
    assert "6 passed, 0 failed, 1 skipped" in done.stdout


def test_versions_that_differ_are_named_with_their_nodes() -> None:
    ranks = [{"node": "a", "torch": "2.13.0"}, {"node": "b", "torch": "2.12.1"}]
    found = alike([json.dumps(rank) for rank in ranks])
    assert found.passed is False
    assert found.text.startswith("torch differs: 2.12.1 on b, 2.13.0 on a; load the same modules")
    assert alike([json.dumps(ranks[0])] * 2).text == "torch 2.13.0"
