"""One of two trainer ranks, of which one has a loss that is not finite; JSON from rank 0.

python tests/support/fault_worker.py MODEL OUT.json   (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are set)
"""

from __future__ import annotations

import json
import os
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
from training.student.actor import Actor
from training.student.deepspeed_engine import start_distributed

VOCAB, GROUP, PROMPT, RESPONSE = 50, 2, 400, 300


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


def make_actor(path: str, zero: int) -> Actor:
    torch.manual_seed(0)
    config = RunConfig(
        student=StudentConfig(path=path),
        sampling=SamplingConfig(group_size=GROUP, max_new_tokens=RESPONSE),
        actor=ActorConfig(zero_stage=zero, learning_rate=1e-3),  # type: ignore[arg-type]
        loss=LossConfig(kl_coef=0.0, clip_low=0.9, clip_high=9.0),
    )
    return Actor(config, path, total_steps=2, learning_rate=1e-3)


def state(actor: Actor) -> list[float]:
    return torch.cat([p.detach().double().flatten() for p in actor.policy.parameters()]).tolist()


def not_finite(path: str, zero: int) -> dict[str, Any]:
    """An infinite advantage on one rank: both leave the update out; the next one is as if it had not been."""
    actor, clean = make_actor(path, zero), make_actor(path, zero)
    start = state(actor)
    skipped = actor.update([batch(poison=True)], 0)
    after = state(actor)
    actor.update([batch()], 1)
    clean.update([batch()], 1)
    return {"skipped": skipped["skipped"], "start": start, "after": after, "next": state(actor), "clean": state(clean)}


def main(path: str, out: Path) -> None:
    torch.set_num_threads(1)
    start_distributed()
    results = {f"not finite, zero {zero}": not_finite(path, zero) for zero in (0, 1)}
    distributed.barrier()
    if distributed.is_main():
        out.write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may hang at exit
