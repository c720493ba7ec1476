"""DeepSpeed's rollout interface, and the safety net that leaves a sampler which does not sample the policy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT, environment

WORKER = """
import json, logging, sys, types
sys.path.insert(0, {root!r})
import torch
from configs.schema import ActorConfig, RunConfig, SamplingConfig, StudentConfig
from training.actor import Actor
from training.deepspeed_engine import RolloutEngine, RolloutRequest, RolloutSampling, start_distributed
from training.experience import Prompt
from training.rollout import GroupedRollout
from training.sampling_check import SamplingBroken, check_sampling
from training import sampling_check

logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
torch.set_num_threads(1)
start_distributed()
path = sys.argv[1]
config = RunConfig(
    student=StudentConfig(path=path), sampling=SamplingConfig(group_size=4, max_new_tokens=12),
    actor=ActorConfig(rollout=sys.argv[2], zero_stage=1),
)
prompts = [Prompt(i, "", p, (), "") for i, p in enumerate([(3, 4, 5, 6), (7, 8), (9, 10, 11), (12,)])]
actor = Actor(config, path, total_steps=1, learning_rate=1e-3)
case, out = sys.argv[3], {{}}

class Broken(RolloutEngine):  # its kernels are broken: it draws whatever
    name = "broken"
    def generate(self, request, sampling):
        batch = GroupedRollout(actor.policy, (), pad_token=0).generate(request, sampling)
        start = int(batch.response_start_idx[0])
        batch.input_ids[:, start:] = torch.randint(3, 50, batch.input_ids[:, start:].shape)
        return batch
    def sync_weights(self, step):
        pass

if case == "interface":
    engine = GroupedRollout(actor.policy, actor.end_tokens, pad_token=0)
    ids = torch.tensor([[0, 3, 4], [5, 6, 7]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    greedy = engine.generate(RolloutRequest(ids, mask), RolloutSampling(max_new_tokens=6, temperature=0.0))
    out["greedy"] = greedy.input_ids.tolist()
    out["mask"] = greedy.attention_mask.tolist()
    out["start"] = greedy.response_start_idx.tolist()
    plain = actor.policy.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    out["plain"] = plain.tolist()
    drawn = [
        engine.generate(RolloutRequest(ids, mask), RolloutSampling(max_new_tokens=6, n_samples_per_prompt=3))
        for _ in range(2)
    ]
    out["batch"] = drawn[0].batch_size
    out["anew"] = not torch.equal(drawn[0].input_ids, drawn[1].input_ids)
    out["is_engine"] = isinstance(engine, RolloutEngine)
elif case == "check":
    out["mismatch"] = check_sampling(actor, prompts, config)
    rollout = actor.sample(prompts, step=0)
    out["lengths"] = rollout.lengths_B.tolist()
    out["ends"] = [bool(r[-1] in actor.end_tokens) for r in rollout.responses] == rollout.finished_B.tolist()
    out["again"] = actor.sample(prompts, step=0).responses == rollout.responses
elif case == "gibberish":
    actor.rollout = Broken()
    out["mismatch"] = check_sampling(actor, prompts, config)
elif case == "raises":  # injected layers that the installed transformers does not know
    class Raises(Broken):
        def generate(self, request, sampling):
            raise AttributeError("'tuple' object has no attribute 'size'")
    actor.rollout = Raises()
    out["mismatch"] = check_sampling(actor, prompts, config)
elif case == "packing":  # attention that is wrong only when packed: plain rows are the way out
    from inference.attention import DecodePlan
    attend = DecodePlan.attend
    DecodePlan.attend = lambda self, *a, **k: attend(self, *a, **k) * 1.5
    out["mismatch"] = check_sampling(actor, prompts, config)
    out["grouped"] = actor.policy.grouped
elif case == "hopeless":
    forward = type(actor.policy).forward
    import dataclasses
    def wrong(self, *a, **k):
        found = forward(self, *a, **k)
        return dataclasses.replace(found, logprobs_S=found.logprobs_S - 0.5)
    type(actor.policy).forward = wrong
    try:
        check_sampling(actor, prompts, config)
    except SamplingBroken as error:
        out["error"] = str(error)
out["native"] = actor.rollout is None
print("RESULT " + json.dumps(out))
"""


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.student_models import save
    from tests.teacher_models import save_tokenizer

    path = save("llama", tmp_path_factory.mktemp("student"))
    save_tokenizer(path)
    return path


def probe(student: Path, rollout: str, case: str) -> tuple[dict[str, object], str]:
    done = subprocess.run(
        [sys.executable, "-c", WORKER.format(root=str(ROOT)), str(student), rollout, case],
        env=environment(), capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("RESULT ")), done.stderr


def test_our_sampler_speaks_deepspeeds_interface(student: Path) -> None:
    out, _ = probe(student, "grouped", "interface")
    assert out["is_engine"]
    assert out["batch"] == 6
    assert out["anew"]
    assert out["start"] == [3, 3]
    for ours, plain, mask in zip(out["greedy"], out["plain"], out["mask"], strict=True):
        real = [token for token, kept in zip(ours[3:], mask[3:], strict=True) if kept]
        assert real == plain[3 : 3 + len(real)]  # transformers' own greedy answer, up to its end symbol
    assert out["mask"][0][:3] == [0, 1, 1]


def test_the_grouped_sampler_passes_its_check(student: Path) -> None:
    out, log = probe(student, "grouped", "check")
    assert out["mismatch"] < 1e-5
    assert out["again"]
    assert out["ends"]
    assert "native" not in log


def test_deepspeeds_own_engine_can_be_put_in_its_place(student: Path) -> None:
    out, log = probe(student, "deepspeed", "check")
    assert not out["native"], log
    assert out["again"]
    assert out["ends"]
    assert max(out["lengths"]) <= 12


def test_gibberish_of_another_engine_is_left_for_our_sampler(student: Path) -> None:
    out, log = probe(student, "grouped", "gibberish")
    assert out["native"]
    assert out["mismatch"] < 1e-5
    assert "rollout engine broken" in log
    assert "goes native" in log


def test_an_engine_that_fails_is_left_for_our_sampler(student: Path) -> None:
    out, log = probe(student, "grouped", "raises")
    assert out["native"]
    assert out["mismatch"] < 1e-5
    assert "it failed (AttributeError: 'tuple' object" in log


def test_packed_rows_that_disagree_are_left_for_plain_rows(student: Path) -> None:
    out, log = probe(student, "grouped", "packing")
    assert out["grouped"] is False
    assert out["mismatch"] < 1e-5
    assert "leaves packed rows for plain ones" in log


def test_where_nothing_agrees_the_run_does_not_start(student: Path) -> None:
    out, _ = probe(student, "grouped", "hopeless")
    assert "0.5000 nats a token" in out["error"]
