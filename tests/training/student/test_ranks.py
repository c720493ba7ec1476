"""However the batch is cut among ranks, ZeRO stages and packed rows, the update is the same; and nobody waits for ever.

Each world size is one set of processes (tests/support/rank_worker.py) that run all of its jobs one after the other.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.forked import finish_ranks
from tests.support.model_zoo import make
from tests.support.runs import ROOT
from tests.support.student_models import save
from tests.support.teacher_models import save_tokenizer

WORKER = ROOT / "tests" / "support" / "rank_worker.py"
ALL = 10**6
"""A budget that puts the whole share of a rank into one row."""
DEALS = {
    1: [[[0, 1, 2]], [[3, 4]]],
    2: [[[0, 2], [1]], [[], [3, 4]]],
    3: [[[1], [0, 2], []], [[], [4], [3]]],
}
"""Prompts of each mini-batch by rank: 5 prompts on 3 ranks, and ranks that have none."""
FIRST = {"aggregation": "sequence", "ratio": "token"}
SECOND = {"aggregation": "token", "ratio": "sequence"}


def run_ranks(world: int, jobs: list[dict[str, Any]], folder: Path, seconds: float) -> dict[str, Any]:
    """Start `world` processes and return what rank 0 wrote; a rank that has not ended in time fails the test."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    program = [sys.executable, str(WORKER), str(folder / "jobs.json"), str(folder / "out.json")]
    finish_ranks(program, world, folder, seconds)
    return json.loads((folder / "out.json").read_text())


def job(name: str, world: int, zero: int, budget: int, model: Path, **more: Any) -> dict[str, Any]:
    return {
        "what": "update", "name": name, "zero": zero, "budget": budget, "model": str(model), "deal": DEALS[world],
        **FIRST, **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3: windows alternate with global attention, and one tensor is embedding and output layer."""
    directory = save("gemma3", tmp_path_factory.mktemp("student"))
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mixtral, whose experts get jittered inputs in training mode."""
    directory = tmp_path_factory.mktemp("experts")
    mixtral = make("mixtral")
    mixtral.config.router_jitter_noise = 0.5
    mixtral.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def expected(model: Path, experts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One rank, every way that one rank can do it; `first` and `second` are what all else is compared with."""
    jobs = [
        job("first", 1, 0, ALL, model),
        job("second", 1, 0, ALL, model, **SECOND),
        job("start", 1, 0, ALL, model, deal=[]),
        job("zero 0, each group its own row", 1, 0, 1, model),
        job("zero 1, two groups a row", 1, 1, 30, model),
        job("zero 2, logits in chunks of 2", 1, 2, 45, model, logit_chunk=2),
        job("zero 3, activations recomputed", 1, 3, 1, model, checkpointing=True),
        *(job(f"nothing, zero {zero}", 1, zero, ALL, model, deal=[[[]], [[]]], bare=True) for zero in range(4)),
        *(
            {
                "what": "lively", "name": f"experts, {checkpointing}", "zero": 1, "budget": ALL, "model": str(experts),
                "prompts": [LIVELY[0]], "silent": -1, "checkpointing": checkpointing, **FIRST,
            }
            for checkpointing in (False, True)
        ),
    ]  # fmt: skip
    return run_ranks(1, jobs, tmp_path_factory.mktemp("one"), 400)


def assert_same(one: Mapping[str, Any], other: Mapping[str, Any], start: Mapping[str, Any], name: str) -> None:
    """Every metric of every step within 1e-4, and the parameters within 1e-3 of the distance that they moved."""
    for who in ("actor", "critic"):
        assert len(one[who]) == len(other[who]) == 2
        for step, (left, right) in enumerate(zip(one[who], other[who], strict=True)):
            assert left.keys() == right.keys()
            for key in left:
                assert right[key] == pytest.approx(left[key], rel=1e-4, abs=1e-6), f"{name}: {who} step {step} {key}"
    for key in ("state", "critic_state"):
        before, left, right = (torch.tensor(x[key], dtype=torch.float64) for x in (start, one, other))
        moved = float((left - before).norm())
        assert moved > 0.1, "the update moved the parameters"
        assert float((left - right).norm()) < 1e-3 * moved, f"{name}: {key}"


def test_the_terms_are_all_there(expected: dict[str, Any]) -> None:
    """A comparison of zeros would prove nothing."""
    first, second = expected["first"]["actor"]
    for term in ("policy", "kl", "single_step", "pt", "bc", "total"):
        assert abs(first[f"loss/{term}"]) > 1e-3, term
        assert first[f"loss/{term}"] != pytest.approx(second[f"loss/{term}"], rel=1e-3)
    assert 0 < first["clip_share"] < 0.5
    assert first["grad_norm"] > 0.5, "the gradient is clipped, so its norm has to be the global one"
    other = expected["second"]["actor"][0]
    assert other["loss/policy"] != pytest.approx(first["loss/policy"], rel=1e-2)
    assert expected["first"]["critic"][1]["critic/grad_norm"] > 1e-3


@pytest.mark.parametrize(
    "name",
    [
        "zero 0, each group its own row",
        "zero 1, two groups a row",
        "zero 2, logits in chunks of 2",
        "zero 3, activations recomputed",
    ],
)
def test_one_rank(name: str, expected: dict[str, Any]) -> None:
    assert_same(expected["first"], expected[name], expected["start"], name)


THREE = {
    "zero 0": {"zero": 0, "budget": ALL},
    "zero 0, each group its own row": {"zero": 0, "budget": 1, **SECOND},
    "zero 1": {"zero": 1, "budget": 1},
    "zero 2": {"zero": 2, "budget": 30, **SECOND},
    "zero 3": {"zero": 3, "budget": 1, "checkpointing": True},
    "zero 3, one row": {"zero": 3, "budget": ALL, "logit_chunk": 2},
}
LIVELY = [[(5,) * 50, (6,) * 3], [(7,)], [(8,) * 20, (9,) * 31]]
"""Prompts by rank, of 1 to 50 tokens."""


@pytest.fixture(scope="module")
def three_ranks(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Updates with different budgets, and sampling where one rank's responses all end at their first token."""
    jobs = [job(name, 3, model=model, **settings) for name, settings in THREE.items()]
    jobs += [job(f"not finite, zero {zero}", 3, zero, ALL, model, what="not finite") for zero in (0, 1)]
    jobs += [
        {
            "what": "lively", "name": f"rank {silent} is silent", "zero": 3, "budget": budget, "model": str(model),
            "prompts": LIVELY, "silent": silent, **FIRST,
        }
        for silent, budget in enumerate((1, ALL, 60))
    ]  # fmt: skip
    return run_ranks(3, jobs, tmp_path_factory.mktemp("three"), 400)


@pytest.mark.parametrize("name", THREE)
def test_more_ranks(name: str, expected: dict[str, Any], three_ranks: dict[str, Any]) -> None:
    """A rank without a prompt is in every mini-batch. Two ranks: test_reshaping.py."""
    reference = "second" if THREE[name].get("ratio") == "sequence" else "first"
    assert_same(expected[reference], three_ranks[name], expected["start"], f"3 ranks, {name}")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_trained_is_what_was_sampled_with_experts_too(checkpointing: bool, expected: dict[str, Any]) -> None:
    metrics = expected[f"experts, {checkpointing}"]["metrics"]
    assert metrics["mismatch/max"] < 1e-4
    assert metrics["grad_norm"] > 0


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_step_of_which_no_group_is_left_changes_nothing(zero: int, expected: dict[str, Any]) -> None:
    """Every group was left out, and there is no text: no crash, and no loss that was not finite."""
    found = expected[f"nothing, zero {zero}"]
    assert [step["skipped"] for step in found["actor"]] == [0.0, 0.0]
    assert not any("loss/total" in step for step in found["actor"])
    assert found["state"] == expected["start"]["state"]
    assert found["critic_state"] == expected["start"]["critic_state"]


@pytest.mark.parametrize("zero", [0, 1])
def test_a_loss_that_is_not_finite_on_one_rank(zero: int, three_ranks: dict[str, Any]) -> None:
    found = three_ranks[f"not finite, zero {zero}"]
    assert found["skipped"] == 1.0
    assert found["after"] == found["start"], "left out on every rank"
    assert found["next"] == found["clean"]
    assert found["next"] != found["after"]


@pytest.mark.parametrize("silent", [0, 1, 2])
def test_nobody_waits_for_ever(silent: int, three_ranks: dict[str, Any]) -> None:
    """ZeRO 3: that rank has nothing to compute while the others still sample."""
    result = three_ranks[f"rank {silent} is silent"]
    for rank, lengths in enumerate(result["lengths"]):
        assert lengths == [1 if rank == silent else 9] * (3 * len(LIVELY[rank])), "9 tokens is the limit"
    assert result["least_kl"] >= 0
    assert result["metrics"]["mismatch/max"] < 1e-4
    assert result["metrics"]["grad_norm"] > 0


def test_what_rank_0_does_alone_may_take_hours(tmp_path: Path) -> None:
    """A teacher of 70B is read from a slow disk, or answers all held-out questions, for longer than a collective waits
    (here a second)."""
    (tmp_path / "jobs.json").write_text(json.dumps([{"what": "late", "name": "late", "folder": str(tmp_path)}]))
    program = [sys.executable, str(WORKER), str(tmp_path / "jobs.json"), str(tmp_path / "out.json")]
    finish_ranks(program, 2, tmp_path, 120)
    assert json.loads((tmp_path / "1.json").read_text()) == ["done", "None", "gave up"]
