"""Actors under DeepSpeed on the device that this process sees, a job after the other.

    python tests/gpu/actor_worker.py MODEL JOBS.json OUT

Each job trains MODEL for some steps on the same batch and writes what has become of it to OUT/NAME.safetensors; its
metrics, and whether its sampler passed the start-up check, are lines of JSON on standard output.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    # Some packages install their own tests under this name, which would win over a folder without __init__.py.
    sys.modules["tests"] = types.ModuleType("tests")
    sys.modules["tests"].__path__ = [str(ROOT / "tests")]

import torch
from safetensors.torch import save_file

from configs.schema import ActorConfig, AdapterConfig, LossConfig, RunConfig, SamplingConfig, StudentConfig
from inference.attention.packing import Group
from tests.gpu.device import PROMPTS, RESPONSES
from tests.support.experiences import experience_of, prompts_of, rollout_of
from training.objective import LossWeights, UpdateInput
from training.student.actor import Actor
from training.student.adapters import plain_parameters
from training.student.deepspeed_engine import start_distributed
from training.student.sampling_check import check_sampling

STEPS = 3
RATE = 1e-3
CLONING = [Group((1, 2, 3), ((4, 5, 6, 2),)), Group((7,), ((2,),))]


def run_config(model: Path, job: dict[str, Any]) -> RunConfig:
    """A job's settings; everything else is a run's own default."""
    adapter = AdapterConfig(rank=job.get("rank", 0), four_bit=job.get("four_bit", False))
    return RunConfig(
        student=StudentConfig(path=str(model), dtype=job["dtype"], adapter=adapter),
        sampling=SamplingConfig(group_size=4, max_new_tokens=12),
        loss=LossConfig(bc_coef=0.3, kl_coef=0.1),
        actor=ActorConfig(
            zero_stage=job["zero"],
            offload=job.get("offload", False),
            micro_batch_tokens=24,
            learning_rate=RATE,
            max_grad_norm=1.0,
        ),
    )


def a_batch(actor: Actor) -> UpdateInput:
    """Four groups of three responses with advantages, and two answers to imitate."""
    rollout = rollout_of(prompts_of(PROMPTS), RESPONSES)
    behavior_S = actor.logprobs(rollout)
    random = torch.Generator().manual_seed(1)
    advantages_S, noise_S = torch.randn(2, len(behavior_S), generator=random)
    rollout = rollout_of(rollout.prompts_N, RESPONSES, behavior_S)
    experience = experience_of(rollout, advantages_S, reference_logprobs_S=behavior_S + 0.1 * noise_S)
    return UpdateInput(experience, (), CLONING, LossWeights(policy=1.0, kl=0.1, bc=0.3))


def run(model: Path, job: dict[str, Any], out: Path) -> dict[str, Any]:
    """One job."""
    config = run_config(model, job)
    torch.manual_seed(0)  # a new adapter is drawn, on the CPU
    actor = Actor(config, total_steps=STEPS, learning_rate=RATE)
    result: dict[str, Any] = {"device": str(actor.engine.device)}
    if job.get("sample"):
        prompts = prompts_of(PROMPTS)
        result["mismatch"] = check_sampling(actor, prompts, config)
        result["tokens"] = int(actor.sample(prompts, step=0).lengths_B.sum())
    batch = a_batch(actor)
    steps = [actor.update([batch], step) for step in range(STEPS)]
    result["losses"] = [m["loss/total"] for m in steps]
    result["norms"] = [m["grad_norm"] for m in steps]
    result["skipped"] = sum(m["skipped"] for m in steps)
    plain = plain_parameters(actor.policy.model, actor.engine.gathered)
    state = {name: value.float().cpu().clone().contiguous() for name, value in plain}
    save_file(state, out / f"{job['name']}.safetensors")
    return result


def main() -> None:
    """All jobs; one that fails is reported and the others go on."""
    model, jobs, out = (Path(argument) for argument in sys.argv[1:4])
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    torch.set_num_threads(1)
    start_distributed()
    for job in json.loads(jobs.read_text()):
        try:
            result = run(model, job, out)
        except Exception:
            result = {"error": traceback.format_exc()[-2500:]}
        print("RESULT " + json.dumps({"name": job["name"], **result}), flush=True)


if __name__ == "__main__":
    main()
