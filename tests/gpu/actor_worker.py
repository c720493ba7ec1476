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
from inference.packing import Group
from tests.gpu.device import GROUP, PROMPTS, RESPONSES
from training.actor import Actor
from training.composite import LossWeights, UpdateInput
from training.deepspeed_engine import start_distributed
from training.experience import Experience, Prompt, Rollout
from training.sampling_check import check_sampling

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
            zero_stage=job["zero"], offload=job.get("offload", False), rollout=job.get("rollout", "grouped"),
            micro_batch_tokens=24, learning_rate=RATE, max_grad_norm=1.0,
        ),
    )  # fmt: skip


def a_batch(actor: Actor) -> UpdateInput:
    """Four groups of three responses with advantages, and two answers to imitate."""
    shape, lengths = (len(RESPONSES), max(map(len, RESPONSES))), [len(r) for r in RESPONSES]
    blank = torch.zeros(shape)
    prompts = [Prompt(n, "", tokens, (), "") for n, tokens in enumerate(PROMPTS)]
    rollout = Rollout(
        prompts, GROUP, RESPONSES, torch.ones(len(RESPONSES), dtype=torch.bool), blank, blank, [""] * len(RESPONSES)
    )
    random = torch.Generator().manual_seed(1)
    behavior_BR = actor.logprobs(rollout)
    rollout = Rollout(
        prompts, GROUP, RESPONSES, rollout.finished_B, behavior_BR, behavior_BR, rollout.texts
    )  # fmt: skip
    mask_BR = torch.arange(shape[1])[None] < torch.tensor(lengths)[:, None]
    advantages_BR, noise_BR = (torch.where(mask_BR, torch.randn(shape, generator=random), 0.0) for _ in range(2))
    experience = Experience(rollout, advantages_BR, behavior_BR + 0.1 * noise_BR, None)
    return UpdateInput(experience, (), CLONING, LossWeights(policy=1.0, kl=0.1, bc=0.3))


def run(model: Path, job: dict[str, Any], out: Path) -> dict[str, Any]:
    """One job."""
    config = run_config(model, job)
    torch.manual_seed(0)  # a new adapter is drawn, on the CPU
    actor = Actor(config, model, total_steps=STEPS, learning_rate=RATE)
    result: dict[str, Any] = {"device": str(actor.engine.device)}
    engine = actor.engine.engine
    result["injected"] = len(getattr(engine, "_inference_containers", []))
    if job.get("sample"):
        prompts = [Prompt(n, "", tokens, (), "") for n, tokens in enumerate(PROMPTS)]
        result["mismatch"] = check_sampling(actor, prompts, config)
        result["stayed"] = actor.rollout is not None
        result["tokens"] = int(actor.sample(prompts, step=0).lengths_B.sum())
    batch = a_batch(actor)
    steps = [actor.update([batch], step) for step in range(STEPS)]
    result["losses"] = [m["loss/total"] for m in steps]
    result["norms"] = [m["grad_norm"] for m in steps]
    result["skipped"] = sum(m["skipped"] for m in steps)
    state = {name: value.float().cpu().clone().contiguous() for name, value in actor.plain_parameters()}
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
