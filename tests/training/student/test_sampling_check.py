"""The safety net that leaves a sampler which does not sample the policy: three cases, in one process of DeepSpeed."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from tests.support.forked import finish_forked

WORKER = """
import dataclasses, json, logging, sys
import torch
from configs.schema import ActorConfig, RunConfig, SamplingConfig, StudentConfig
from inference.attention.decode import DecodePlan
from training.experience import Prompt
from training.student.actor import Actor
from training.student.deepspeed_engine import start_distributed
from training.student.sampling_check import SamplingBroken, check_sampling

logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
torch.set_num_threads(1)
start_distributed()
path, out = sys.argv[1], {}
config = RunConfig(
    student=StudentConfig(path=path), sampling=SamplingConfig(group_size=4, max_new_tokens=12),
    actor=ActorConfig(zero_stage=1),
)
prompts = [Prompt(i, "", p, (), "") for i, p in enumerate([(3, 4, 5, 6), (7, 8), (9, 10, 11), (12,)])]
actor = Actor(config, total_steps=1, learning_rate=1e-3)

out["right"] = check_sampling(actor, prompts, config)
rollout = actor.sample(prompts, step=0)
out["lengths"] = rollout.lengths_B.tolist()
out["ends"] = [bool(r[-1] in actor.end_tokens) for r in rollout.responses_B] == rollout.finished_B.tolist()
out["again"] = actor.sample(prompts, step=0).responses_B == rollout.responses_B

attend = DecodePlan.attend  # attention that is wrong only when packed: plain rows are the way out
DecodePlan.attend = lambda self, *a, **k: attend(self, *a, **k) * 1.5
out["packing"] = check_sampling(actor, prompts, config)
out["grouped"] = actor.policy.grouped
DecodePlan.attend = attend

forward = type(actor.policy).forward
def wrong(self, *a, **k):
    found = forward(self, *a, **k)
    return dataclasses.replace(found, logprobs_S=found.logprobs_S - 0.5)
type(actor.policy).forward = wrong
try:
    check_sampling(actor, prompts, config)
except SamplingBroken as error:
    out["error"] = str(error)
print("RESULT " + json.dumps(out))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """(what the worker found, what it said)."""
    from tests.support.student_models import save
    from tests.support.teacher_models import save_tokenizer

    path = save("llama", tmp_path_factory.mktemp("student"))
    save_tokenizer(path)
    (path / "worker.py").write_text(WORKER)
    done = finish_forked([sys.executable, str(path / "worker.py"), str(path)])
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("RESULT ")), done.stderr


def test_a_right_sampler_stays(found: tuple[dict[str, Any], str]) -> None:
    out, _ = found
    assert out["right"] < 1e-4
    assert out["again"]
    assert out["ends"]
    assert all(1 <= length <= 12 for length in out["lengths"])


def test_packing_that_is_wrong_is_left_for_plain_rows(found: tuple[dict[str, Any], str]) -> None:
    out, said = found
    assert "student in packed rows: log-probabilities are" in said
    assert out["packing"] < 1e-4
    assert not out["grouped"]


def test_where_nothing_agrees_the_run_ends_with_the_reason(found: tuple[dict[str, Any], str]) -> None:
    out, _ = found
    assert "in every way of running the model; try student.dtype float32" in out["error"]
