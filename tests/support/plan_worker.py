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
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from configs.schema import RunConfig
from tests.support.experiences import experience_of, prompts_of, rollout_of
from training import distributed
from training.experience import Experience, Rollout
from training.objective import LossWeights, UpdateInput
from training.run.cli import load_config
from training.student.actor import Actor
from training.student.critic import Critic
from training.student.deepspeed_engine import start_distributed
from training.student.loading import load_policy
from training.student.reference import FrozenCopy

PROMPT = 96


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

    asked = prompts_of([tokens(PROMPT) for _ in range(prompts)])
    return rollout_of(asked, [tokens(R) for _ in range(prompts * G)], torch.full((prompts * G * R,), -7.0))


def experience(config: RunConfig, sampled: Rollout) -> Experience:
    """The rollout with made-up advantages and, for PPO, values."""
    zeros_S = torch.zeros_like(sampled.behavior_logprobs_S)
    advantages_S = torch.randn(zeros_S.shape)
    if config.algo == "ppo":
        return experience_of(sampled, advantages_S, zeros_S + 1.0, values_S=zeros_S)
    return experience_of(sampled, advantages_S)


def measure(config: RunConfig) -> dict[str, int]:
    """Build everything and update twice; resident bytes over the baseline."""
    load_policy(config.student.path, config.student.dtype)  # oneDNN keeps its kernels for the first pass's shapes
    out, baseline = {}, settle()
    torch.manual_seed(0)
    actor = Actor(config, total_steps=10, learning_rate=1e-6)
    needed = config.ppo.kl_penalty if config.algo == "ppo" else config.loss.kl_coef
    before = settle()
    reference = FrozenCopy(config, actor.engine.device) if needed > 0 else None
    if reference is not None:  # float32 weights stay in the file's pages until they are read
        sum(float(p.sum()) for p in reference._policy.parameters())
    out["reference"] = settle() - before
    critic = Critic(config, total_steps=10) if config.algo == "ppo" else None
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
