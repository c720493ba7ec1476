"""One of two trainer ranks that runs out of memory, or whose loss is not finite; JSON from rank 0.

python tests/support/fault_worker.py MODEL OUT.json   (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are set)

Memory runs out for real: the kernel's limit on this process's data (RLIMIT_DATA) is set between what the passes need
and what they need with half the token budget, on rank 1 alone.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

import torch

from configs.schema import ActorConfig, LossConfig, RunConfig, SamplingConfig, StudentConfig
from tests.support.experiences import experience_of, prompts_of, rollout_of
from training import distributed
from training.objective import LossWeights, UpdateInput
from training.run.memory import OutOfMemory
from training.student.actor import Actor, MetricSums, _Update
from training.student.deepspeed_engine import start_distributed

VOCAB, GROUP, PROMPT, RESPONSE = 50, 2, 400, 300
BUDGET = 4 * (PROMPT + GROUP * RESPONSE)
"""Four groups in a pass; half of it is two."""
BUCKET = 4 * 500_000_000
"""Bytes that DeepSpeed takes for a moment under ZeRO 1 (reduce_bucket_size in float32)."""


def batch(poison: bool = False) -> UpdateInput:
    """Four groups for each rank; with `poison`, one advantage of rank 1 is infinite."""
    random = torch.Generator().manual_seed(distributed.rank())
    prompts = torch.randint(3, VOCAB, (4, PROMPT), generator=random).tolist()
    responses = torch.randint(3, VOCAB, (4 * GROUP, RESPONSE), generator=random).tolist()
    tokens = 4 * GROUP * RESPONSE
    advantages_S = torch.randn(tokens, generator=random)
    if poison and distributed.rank() == 1:
        advantages_S[0] = float("inf")
    rollout = rollout_of(prompts_of(prompts), responses, torch.full((tokens,), -4.0))
    return UpdateInput(experience_of(rollout, advantages_S), [], [], LossWeights(policy=1.0))


def make_actor(path: str, zero: int, budget: int) -> Actor:
    torch.manual_seed(0)
    config = RunConfig(
        student=StudentConfig(path=path),
        sampling=SamplingConfig(group_size=GROUP, max_new_tokens=RESPONSE),
        actor=ActorConfig(zero_stage=zero, micro_batch_tokens=budget, learning_rate=1e-3),  # type: ignore[arg-type]
        loss=LossConfig(kl_coef=0.0, clip_low=0.9, clip_high=9.0),
    )
    return Actor(config, path, total_steps=2, learning_rate=1e-3)


def state(actor: Actor) -> list[float]:
    return torch.cat([p.detach().double().flatten() for p in actor.policy.parameters()]).tolist()


def status(name: str) -> int:
    """A line of /proc/self/status, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def needed(actor: Actor, budget: int) -> int:
    """Bytes that the forward passes of the batch take at their highest with gradients kept."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = status("VmRSS")
    actor.engine.passes.budget.tokens = budget
    actor.policy.train()
    # The gradients are thrown away: the passes of one row after the other, as the update has them.
    plan = _Update(batch(), {"tokens": 1.0, "responses": 1.0, "pt": 0.0, "bc": 0.0}, step=0)
    for job in actor._jobs(plan, budget, MetricSums()):
        torch.stack([*job().values()]).sum().backward()
    actor.policy.zero_grad()
    return status("VmHWM") - before


def limited(actor: Actor, extra: int) -> dict[str, Any]:
    """An update with `extra` bytes more than now for rank 1, and the parameters after it."""
    if distributed.rank() == 1:
        resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + extra, resource.RLIM_INFINITY))
    try:
        metrics = actor.update([batch()], 0)
    except OutOfMemory as error:
        metrics = {"failed": 1.0, "here": float("another rank" not in str(error))}
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    budgets = [float(x) for x in distributed.gather_strings([str(actor.engine.passes.budget.tokens)])]
    return {"metrics": metrics, "budgets": budgets, "state": state(actor)}


def out_of_memory(path: str, zero: int) -> dict[str, Any]:
    whole = make_actor(path, zero, BUDGET)
    start = state(whole)
    if zero == 0:
        much, half = needed(whole, BUDGET), needed(whole, BUDGET // 2)
    else:
        probe = make_actor(path, 0, BUDGET)
        much, half = needed(probe, BUDGET), needed(probe, BUDGET // 2)
    whole.engine.passes.budget.tokens = BUDGET
    room = BUCKET if zero == 1 else 0
    results = {"needed": [much, half], "start": start, "halved": limited(whole, room + (much + half) // 2)}
    results["smaller"] = limited(make_actor(path, zero, BUDGET // 2), 10 * BUCKET)
    results["hopeless"] = limited(make_actor(path, zero, BUDGET), room + half // 8)
    return results


def not_finite(path: str, zero: int) -> dict[str, Any]:
    """An infinite advantage on one rank: both leave the update out; the next one is as if it had not been."""
    actor, clean = make_actor(path, zero, BUDGET), make_actor(path, zero, BUDGET)
    skipped = actor.update([batch(poison=True)], 0)
    after = state(actor)
    actor.update([batch()], 1)
    clean.update([batch()], 1)
    return {"skipped": skipped["skipped"], "after": after, "next": state(actor), "clean": state(clean)}


def main(path: str, out: Path) -> None:
    torch.set_num_threads(1)
    start_distributed()
    results = {
        **{f"memory, zero {zero}": out_of_memory(path, zero) for zero in (0, 1)},
        **{f"not finite, zero {zero}": not_finite(path, zero) for zero in (0, 1)},
    }
    distributed.barrier()
    if distributed.is_main():
        out.write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may hang at exit
