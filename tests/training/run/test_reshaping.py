"""A checkpoint is resumed on another number of ranks and at another ZeRO stage where DeepSpeed can, else refused.

Student and critic of tests/support/rank_worker.py take a step, are saved, and take another; whoever resumes has the
same parameters at once, and after that step too, which shows that Adam's moments and its count of steps came along.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.student_models import save
from tests.support.teacher_models import save_tokenizer
from tests.training.student.test_ranks import ALL, job, run_ranks
from training.run.checkpoint_files import Manifest
from training.run.resuming import Found
from training.run.run_folder import Progress

PAIRS = ["1/0 to 2/0", "1/1 to 2/2", "1/3 to 2/3", "2/2 to 1/1", "2/3 to 1/3", "1/1 to 1/2"]
"""Ranks / ZeRO stage of whoever writes and of whoever goes on."""
REFUSED = ["1/1 to 2/3", "2/3 to 1/0"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three sets of processes: one rank writes, two write and resume, one resumes."""
    base = tmp_path_factory.mktemp("reshaping")
    model = save("gemma3", base / "student")
    save_tokenizer(model)

    def saving(world: int, *stages: int) -> list[dict[str, Any]]:
        return [
            job(f"{world}/{zero}", world, zero, ALL, model, what="save", folder=str(base / f"{world}-{zero}"))
            for zero in stages
        ]

    def resuming(world: int) -> list[dict[str, Any]]:
        jobs = []
        for name in PAIRS + REFUSED:
            written, _, now = name.partition(" to ")
            if now.startswith(f"{world}/"):
                folder = base / written.replace("/", "-")
                jobs.append(job(name, world, int(now[2:]), ALL, model, what="resume", folder=str(folder)))
        return jobs

    found = run_ranks(1, saving(1, 0, 1, 3), base / "a", 300)
    found |= run_ranks(2, saving(2, 2, 3) + resuming(2), base / "b", 400)
    return found | run_ranks(1, resuming(1), base / "c", 300)


@pytest.mark.parametrize("pair", PAIRS)
def test_it_goes_on_alike(pair: str, results: dict[str, Any]) -> None:
    written, resumed = results[pair.partition(" to ")[0]], results[pair]
    for who in range(2):
        before, after = (torch.tensor(written[key][who], dtype=torch.float64) for key in ("before", "after"))
        moved = float((after - before).norm())
        assert moved > 0.01, "the step moves the parameters"
        assert torch.equal(torch.tensor(resumed["before"][who], dtype=torch.float64), before)
        distance = float((torch.tensor(resumed["after"][who], dtype=torch.float64) - after).norm())
        assert distance < 1e-3 * moved, f"{pair}: {('student', 'critic')[who]}"


@pytest.mark.parametrize("pair", REFUSED)
def test_elsewhere_it_is_refused_before_a_model_is_loaded(pair: str, results: dict[str, Any]) -> None:
    (message,) = results[pair].values()
    written, _, now = pair.partition(" to ")
    assert f"actor.zero_stage = {now[2:]}: " in message
    assert f"was written at stage {written[2:]}" in message
    assert f"set it to {written[2:]}" in message


def test_bfloat16_without_zero_needs_as_many_ranks() -> None:
    manifest = Manifest(step=10, world_size=4, zero_stages={"student": 0}, versions={}, files={})
    found = Found(Path("checkpoints/step-000010"), manifest, Progress(step=10))
    found.check({"student": 0, "critic": 1}, "float32")
    with pytest.raises(ValueError, match=r"actor.zero_stage = 0: .*written by 4 ranks.*start 4 in place of 1"):
        found.check({"student": 0, "critic": 1}, "bfloat16")
