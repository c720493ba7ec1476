"""One rank of a small trainer for tests: real process group, real DeepSpeed, real actor and critic; JSON from rank 0.

python tests/support/rank_worker.py JOBS.json OUT.json   (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are
set)

Every job cuts the same fixed batch otherwise: among ranks, into packed rows, into DeepSpeed's partitions.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout as set_timeout

from configs.schema import (
    ActorConfig,
    CheckpointConfig,
    CriticConfig,
    LossConfig,
    RunConfig,
    SamplingConfig,
    StudentConfig,
)
from inference.attention.packing import Group
from tests.support.experiences import experience_of, prompts_of, rollout_of
from training import distributed
from training.experience import Experience, take
from training.losses import OutputLayer
from training.objective import LossWeights, UpdateInput
from training.run.checkpoints import Checkpoints, Saveable
from training.run.resuming import find, load
from training.run.run_folder import Progress
from training.student.actor import Actor
from training.student.critic import Critic
from training.student.deepspeed_engine import Engine, start_distributed
from training.student.reference import FrozenCopy

VOCAB, TEACHER_HIDDEN, GROUP = 50, 12, 3
WEIGHTS = LossWeights(policy=1.0, kl=0.1, pt=0.2, bc=0.3, single_step=0.5)
PROMPTS = [(3, 4, 5, 6, 7, 8, 9), (10,), (11, 12), tuple(range(5, 33)), (9, 8, 7)]
LENGTHS = [(4, 1, 0), (6, 2, 2), (1, 1, 1), (3, 9, 5), (0, 7, 2)]
TEXT = [(1, 2, 3, 4, 5), (6, 7), (8, 9, 10, 11, 12, 13, 14, 15)]
CLONING = [((1, 2, 3), (4, 5, 6, 2)), ((7,), (2,)), ((8, 9), (10, 2))]


def main(jobs: list[dict[str, Any]], out: Path) -> None:
    """Run all jobs in one process group; rank 0 writes name -> result."""
    torch.set_num_threads(1)
    start_distributed()
    results = {}
    for job in jobs:
        print(job["name"], flush=True)
        results[job["name"]] = JOBS[job["what"]](job)
    distributed.barrier()
    if distributed.is_main():
        out.write_text(json.dumps(results))


def run_config(job: dict[str, Any]) -> RunConfig:
    """Every term of the loss is on."""
    return RunConfig(
        student=StudentConfig(path=job["model"], gradient_checkpointing=job.get("checkpointing", False)),
        sampling=SamplingConfig(group_size=GROUP, max_new_tokens=9, temperature=0.7),
        actor=ActorConfig(
            zero_stage=job["zero"], micro_batch_tokens=job["budget"], max_grad_norm=0.5, learning_rate=1e-3
        ),
        critic=CriticConfig(zero_stage=job["zero"], learning_rate=1e-2),
        loss=LossConfig(
            kl_coef=0.1, pt_coef=0.2, bc_coef=0.3, aggregation=job["aggregation"], ratio=job["ratio"], clip_high=0.1
        ),
    )  # fmt: skip


def whole_batch(config: RunConfig) -> Experience:
    """The same five prompts with their responses on every rank, in the same order; three responses are empty."""
    random = torch.Generator().manual_seed(3)
    lengths = [n for group in LENGTHS for n in group]
    responses = [tuple(torch.randint(3, VOCAB, (n,), generator=random).tolist()) for n in lengths]
    rollout = rollout_of(prompts_of(PROMPTS), responses)
    logprobs_S = FrozenCopy(config, torch.device("cpu")).logprobs(rollout)

    def near(centre_S: torch.Tensor, spread: float) -> torch.Tensor:
        return centre_S + spread * torch.randn(len(centre_S), generator=random)

    zeros_S = torch.zeros_like(logprobs_S)
    behavior_S = near(logprobs_S, 0.15)  # some ratios are clipped, most are not
    return experience_of(
        replace(rollout, behavior_logprobs_S=behavior_S, sampled_logprobs_S=behavior_S),
        advantages_S=near(zeros_S, 1.0),
        value_targets_S=near(zeros_S, 1.0),
        hidden_SD=torch.randn(sum(lengths), TEACHER_HIDDEN, generator=random),
        reference_logprobs_S=near(logprobs_S, 0.3),
        values_S=near(zeros_S, 0.3),
    )


def teacher_output() -> torch.Tensor:
    """[V, D] output layer of a teacher that exists only as this matrix."""
    return torch.randn(VOCAB, TEACHER_HIDDEN, generator=torch.Generator().manual_seed(4))


def my_share(items: Sequence[Any], mini: int) -> list[Any]:
    """Texts and examples: the first mini-batch is dealt round, all of the second is the last rank's."""
    rank, world = distributed.rank(), distributed.world_size()
    return [x for i, x in enumerate(items) if (i % world if mini == 0 else world - 1) == rank]


def mini_batches(job: dict[str, Any], whole: Experience) -> list[UpdateInput]:
    """This rank's part of each optimizer step; job["deal"][mini][rank] lists prompts."""
    text = [] if job.get("bare") else [Group(t[:1], (t[1:],)) for t in TEXT]
    cloning = [] if job.get("bare") else [Group(prompt, (answer,)) for prompt, answer in CLONING]
    return [
        UpdateInput(
            experience=take(whole, by_rank[distributed.rank()]),
            text=my_share(text, mini),
            cloning=my_share(cloning, mini),
            weights=WEIGHTS,
        )
        for mini, by_rank in enumerate(job["deal"])
    ]


def update(job: dict[str, Any]) -> dict[str, Any]:
    """Two mini-batches: metrics of the actor and of the critic, and the parameters that came out."""
    config = run_config(job)
    batches = mini_batches(job, whole_batch(config))
    torch.manual_seed(0)
    actor = Actor(
        config, total_steps=2, learning_rate=config.actor.learning_rate,
        teacher_head=OutputLayer(teacher_output()),
    )  # fmt: skip
    actor.policy.logit_chunk = job.get("logit_chunk", 1024)
    steps = [actor.update([batch], step) for step, batch in enumerate(batches)]
    state = flat_state(actor.engine)
    del actor
    torch.manual_seed(0)
    critic = Critic(config, total_steps=2)
    # The first mini-batch moves the value head away from zero; the second reaches the backbone.
    experiences = [b.experience for b in batches if b.experience is not None]
    critic_steps = [critic.update([experience], step) for step, experience in enumerate(experiences)]
    return {"actor": steps, "critic": critic_steps, "state": state, "critic_state": flat_state(critic.engine)}


def flat_state(engine: Engine) -> list[float]:
    """All parameters end to end, on rank 0; nothing elsewhere. Collective under ZeRO 3."""
    values: list[torch.Tensor] = []
    for parameter in engine.module.parameters():
        with engine.gathered([parameter]):
            values.append(parameter.detach().double().flatten().clone())
    return torch.cat(values).tolist() if distributed.is_main() else []


def save(job: dict[str, Any]) -> dict[str, Any]:
    """The first mini-batch, a checkpoint, the second mini-batch: parameters before and after the last."""
    actor, critic, batches = students(job)
    assert batches[0].experience is not None
    actor.update([batches[0]], 0)
    critic.update([batches[0].experience], 0)
    parts: dict[str, Saveable] = {"student": actor.engine, "critic": critic.engine}
    Checkpoints(Path(job["folder"]), CheckpointConfig()).save(parts, Progress(step=1))
    return go_on(actor, critic, batches[1])


def resume(job: dict[str, Any]) -> dict[str, Any]:
    """From that checkpoint, written by other ranks or at another ZeRO stage, the second mini-batch."""
    found = find(Path(job["folder"]))
    assert found is not None
    try:
        found.check({"student": job["zero"], "critic": job["zero"]}, dtype="float32")
    except ValueError as error:
        return {"refused": str(error)}
    actor, critic, batches = students(job)
    assert load(found, {"student": actor.engine, "critic": critic.engine}).step == 1
    return go_on(actor, critic, batches[1])


def not_finite(job: dict[str, Any]) -> dict[str, Any]:
    """The first mini-batch with an infinite advantage on rank 1, then the second: parameters at the start and after
    each, and after the second alone."""
    actor, _, (poisoned, second) = students(job)
    clean, _, _ = students(job)
    assert poisoned.experience is not None
    if distributed.rank() == 1:
        poisoned.experience.advantages_S[0] = float("inf")
    found: dict[str, Any] = {"start": flat_state(actor.engine)}
    found["skipped"] = actor.update([poisoned], 0)["skipped"]
    found["after"] = flat_state(actor.engine)
    for name, one in (("next", actor), ("clean", clean)):
        one.update([second], 1)
        found[name] = flat_state(one.engine)
    return found


def students(job: dict[str, Any]) -> tuple[Actor, Critic, list[UpdateInput]]:
    """A new actor, a new critic, and their mini-batches."""
    config = run_config(job)
    torch.manual_seed(0)
    actor = Actor(config, total_steps=2, learning_rate=1e-3, teacher_head=OutputLayer(teacher_output()))
    critic = Critic(config, total_steps=2)
    return actor, critic, mini_batches(job, whole_batch(config))


def go_on(actor: Actor, critic: Critic, batch: UpdateInput) -> dict[str, Any]:
    """Parameters before and after a step on `batch`."""
    assert batch.experience is not None
    before = [flat_state(actor.engine), flat_state(critic.engine)]
    actor.update([batch], 1)
    critic.update([batch.experience], 1)
    return {"before": before, "after": [flat_state(actor.engine), flat_state(critic.engine)]}


def sample_and_update(job: dict[str, Any]) -> dict[str, Any]:
    """Sampling, the exact KL to the teacher and an update, where one rank's responses end at their first token."""
    config = run_config(job)
    rank = distributed.rank()
    actor = Actor(
        config, total_steps=1, learning_rate=1e-3, teacher_head=OutputLayer(teacher_output())
    )  # fmt: skip
    actor.end_tokens = tuple(range(VOCAB)) if rank == job["silent"] else ()
    rollout = actor.sample(prompts_of(job["prompts"][rank]), step=0)
    total = int(rollout.lengths_B.sum())
    hidden_SD = torch.randn(total, TEACHER_HIDDEN, generator=torch.Generator().manual_seed(rank))
    kl_S = actor.teacher_kl(rollout, hidden_SD)
    logprobs_S = rollout.behavior_logprobs_S
    experience = experience_of(
        rollout, torch.ones_like(logprobs_S), hidden_SD=hidden_SD, reference_logprobs_S=logprobs_S
    )
    metrics = actor.update([UpdateInput(experience, my_share([Group((1,), ((2, 3),))], 1), [], WEIGHTS)], step=0)
    lengths = distributed.gather_strings([json.dumps(rollout.lengths_B.tolist())])
    least_kl = -distributed.max_over_ranks(-float(kl_S.min()))
    return {"lengths": [json.loads(text) for text in lengths], "metrics": metrics, "least_kl": least_kl}


def late(job: dict[str, Any]) -> list[str]:
    """Rank 0 comes to a collective after the others have given up; what it does alone they wait for. Last: the group is
    of no use then."""
    set_timeout(timedelta(seconds=1), dist.group.WORLD)
    said = distributed.gather_strings([str(distributed.by_main(lambda: time.sleep(2) or "done"))])
    if distributed.is_main():
        time.sleep(2)
    try:
        distributed.barrier()
    except RuntimeError:
        said.append("gave up")
    (Path(job["folder"]) / f"{distributed.rank()}.json").write_text(json.dumps(said))
    os._exit(0)


JOBS = {
    "late": late,
    "update": update,
    "not finite": not_finite,
    "lively": sample_and_update,
    "save": save,
    "resume": resume,
}

if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may hang at exit
