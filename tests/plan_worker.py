"""One rank of a real trainer, measured: `python plan_worker.py TINY.yaml CONFIG.yaml ...`; see test_plan.py.

Rank 0 prints one JSON line of byte counts for each configuration. The first one only loads code: what the libraries
keep after it is the baseline.

Resident memory is exact here because every tensor has a mapping of its own (MALLOC_MMAP_THRESHOLD_ in the caller's
environment): what is freed is gone from the process's memory at once, and VmHWM is the true peak.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from configs.schema import RunConfig
from training import distributed
from training.actor import Actor
from training.cli import load_config
from training.composite import LossWeights, UpdateInput
from training.critic import Critic
from training.deepspeed_engine import start_distributed
from training.experience import Experience, Prompt, Rollout
from training.reference import FrozenCopy

PROMPT = 96
SAMPLED = 8
"""Times a rank's prompts that are answered together, so that caches outweigh what is not a tensor."""


def resident(key: str) -> int:
    """Bytes of one Vm line of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def settle() -> int:
    """Resident bytes when nothing runs; the high-water mark starts again from here."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def rollout(config: RunConfig, prompts: int, seed: int) -> Rollout:
    """Random prompts of PROMPT tokens with full-length responses."""
    G, R = config.sampling.group_size, config.sampling.max_new_tokens
    draw = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 1000, (n,), generator=draw).tolist())

    return Rollout(
        prompts=[Prompt(index=i, text="", tokens=tokens(PROMPT), answers=(), question="") for i in range(prompts)],
        group_size=G, responses=tuple(tokens(R) for _ in range(prompts * G)),
        finished_B=torch.ones(prompts * G, dtype=torch.bool),
        behavior_logprobs_BR=torch.full((prompts * G, R), -7.0), sampled_logprobs_BR=torch.full((prompts * G, R), -7.0),
        texts=[""] * (prompts * G),
    )  # fmt: skip


def experience(config: RunConfig, sampled: Rollout) -> Experience:
    """The rollout with made-up advantages and, for PPO, values."""
    shape = sampled.behavior_logprobs_BR.shape
    ppo = config.algo == "ppo"
    return Experience(
        rollout=sampled, advantages_BR=torch.randn(shape), reference_logprobs_BR=None, teacher_hidden_SD=None,
        values_BR=torch.zeros(shape) if ppo else None, returns_BR=torch.ones(shape) if ppo else None,
    )  # fmt: skip


def measure(config: RunConfig) -> dict[str, int]:
    """Build everything, update twice, then the reference and sampling; resident bytes over the baseline."""
    out, baseline = {}, settle()
    torch.manual_seed(0)
    actor = Actor(config, config.student.path, total_steps=10, learning_rate=1e-6)
    needed = config.ppo.kl_penalty if config.algo == "ppo" else config.loss.kl_coef
    before = settle()
    reference = FrozenCopy(config, config.student.path, actor.engine.device) if needed > 0 else None
    if reference is not None:  # float32 weights stay in the file's pages until they are read
        sum(float(p.sum()) for p in reference._policy.parameters())
    out["reference"] = settle() - before
    critic = Critic(config, Path(config.student.path), total_steps=10) if config.algo == "ppo" else None
    sampled = rollout(config, config.prompts_per_step // distributed.world_size(), distributed.rank())
    batch = experience(config, sampled)
    for i in range(2):  # Adam's moments come with the first step
        out["static"] = settle() - baseline
        actor.update([UpdateInput(experience=batch, text=(), cloning=(), weights=LossWeights(policy=1.0))], i)
        out["actor_update"] = resident("VmHWM") - baseline - out["static"]
        if critic is not None:
            before = settle()
            critic.update([batch], i)
            out["critic_update"] = resident("VmHWM") - before
    if reference is not None:
        before = settle()
        reference.logprobs(sampled)
        out["reference_forward"] = resident("VmHWM") - before
    before = settle()
    actor.end_tokens = (10**6,)  # no response ends early
    actor.sample([*sampled.prompts] * SAMPLED, step=0)
    out["sampling"] = resident("VmHWM") - before
    return out


def main(tiny: str, *paths: str) -> None:
    """Load the code with the tiny run, then measure the others."""
    torch.set_num_threads(1)
    start_distributed()
    for path in (tiny, *paths):
        out = measure(load_config(Path(path)))
        gc.collect()
        if distributed.is_main() and path != tiny:
            print(json.dumps(out), flush=True)
    distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
