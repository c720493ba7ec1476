"""`training/main.py --doctor`: a healthy run passes every check, and each kind of illness is found on its own line."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.forked import finish_forked
from tests.support.runs import ROOT, command, finish

LINE = re.compile(r"^(?P<name>\S.{13}) (?P<verdict>pass|FAIL|skipped:) (?P<text>.+)$")
EVERY = {
    "tokenizer", "end symbols", "sampling", "ratio", "KL teacher", "KL reference", "micro-batch", "packing", "TP",
}  # fmt: skip


def lines_of(output: str) -> dict[str, tuple[str, str]]:
    found = (LINE.match(line) for line in output.splitlines())
    return {m["name"].strip(): (m["verdict"], m["text"]) for m in found if m}


def test_two_ranks_under_zero_3_and_two_teachers_pass(tmp_path: Path, demo_cache: Path) -> None:
    """One rank: below; without a reference: tests/inference/test_endpoint.py."""
    flags = ("--doctor", "--algo", "ppo", "--actor.zero_stage", "3", "--critic.zero_stage", "3")
    second = "--teachers=[{name: b, path: demo, tensor_parallel: 1}]"
    done = finish(command(tmp_path / "runs", demo_cache, *flags, second, ranks=2))
    lines = lines_of(done.stdout)
    assert set(lines) == EVERY | {"tokenizer b", "end symbols b", "TP b"}
    assert {verdict for verdict, _ in lines.values()} == {"pass"}, done.stdout
    assert "12 passed, 0 failed, 0 skipped" in done.stdout
    assert "on 1 and on 2 processes" in lines["TP b"][1]
    worst = re.search(r"differ by at most (\S+) nats \(allowed 2e-04\)", lines["sampling"][1])
    assert worst is not None
    assert 0 < float(worst[1]) < 1e-4, "a number that was measured"
    assert not (tmp_path / "runs").exists(), "nothing is written"


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory, demo_cache: Path) -> dict[str, Any]:
    """What tests/support/doctor_worker.py found: breakage -> check -> (passed, text)."""
    folder = tmp_path_factory.mktemp("doctor")
    flags = command(folder, demo_cache, "--algo", "grpo", "--loss.kl_coef", "0.1", "--sampling.temperature", "0.7")[2:]
    finish_forked(
        [sys.executable, str(ROOT / "tests" / "support" / "doctor_worker.py"), str(folder / "out.json"), *flags]
    )
    return json.loads((folder / "out.json").read_text())


def failed(findings: dict[str, Any], name: str) -> set[str]:
    return {check for check, (passed, _) in findings[name].items() if passed is False}


def test_a_healthy_run_with_a_reference_and_a_temperature_passes(findings: dict[str, Any]) -> None:
    assert {check: passed for check, (passed, _) in findings["healthy"].items()} == dict.fromkeys(EVERY, True)


@pytest.mark.parametrize(
    ("breakage", "lines"),
    [
        ("sampled_at_another_temperature", {"sampling", "ratio"}),
        ("decoding_is_a_position_late", {"sampling", "ratio"}),
        ("each_micro_batch_has_its_own_mean", {"micro-batch"}),
        ("the_kl_has_its_sign_turned", {"KL teacher"}),
        ("the_reference_is_another_model", {"KL reference"}),
        ("the_teacher_ends_otherwise", {"end symbols"}),
        ("the_tokenizers_differ_unnoticed", {"tokenizer"}),
        ("the_other_teacher_has_other_weights", {"TP"}),
    ],
)
def test_an_illness_is_found_on_its_line_alone(breakage: str, lines: set[str], findings: dict[str, Any]) -> None:
    assert failed(findings, breakage) == lines, json.dumps(findings[breakage], indent=1)


def test_wrong_positions_in_packed_rows_are_found(findings: dict[str, Any]) -> None:
    """Whatever reads a packed row is wrong then; the comparison with transformers says where."""
    assert {"packing", "sampling", "ratio"} <= failed(findings, "positions_run_through_the_row")
