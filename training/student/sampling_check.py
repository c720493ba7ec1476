"""The safety net under sampling: at start-up, do sampling, the training forward and transformers' own forward agree on
real prompts?

A wrong mask or position would not show in a loss curve for days. What `loading.settle` found on a few made-up tokens is
tried here on the device, under DeepSpeed, with prompts of the run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from configs.schema import RunConfig
from training import distributed
from training.experience import Prompt, Rollout
from training.run.stopping import RunFailed
from training.student.actor import Actor
from training.student.loading import NOISE, TOLERANCE, own_logprobs
from training.student.policy import Way

log = logging.getLogger(__name__)
TOKENS = 16
"""Longest probe."""


class SamplingBroken(RunFailed):
    """No way of running the model agrees with transformers."""


def check_sampling(actor: Actor, prompts: Sequence[Prompt], config: RunConfig) -> float:
    """Probe the actor on a few prompts and leave its way of running the model for a safer one where it fails.
    Collective.

    Returns the mean difference that stays, nats a token. Raises SamplingBroken where no way agrees.
    """
    started = time.perf_counter()
    longest = min(TOKENS, config.sampling.max_new_tokens)
    probe = replace(config.sampling, group_size=4, max_new_tokens=longest)
    for way in list(Way)[list(Way).index(actor.policy.way) :]:
        actor.policy.run(way)
        rollout = actor.sample(prompts, step=-1, sampling=probe)
        found, noise = mismatch(actor, rollout, probe.temperature)
        limit = max(TOLERANCE[actor.policy.model.dtype], NOISE * noise)
        if found <= limit:
            if distributed.is_main():
                seconds = time.perf_counter() - started
                log.info("student: log-probabilities as sampled, as trained and as transformers has them are within "
                         "%.1e nats a token, in %s (%.1f s)", found, way.value, seconds)  # fmt: skip
            return found
        log.warning(
            "student in %s: log-probabilities are %.4f nats a token from transformers' own or from those sampled "
            "(limit %.2g)", way.value, found, limit,
        )  # fmt: skip
    raise SamplingBroken(
        f"student.path = {config.student.path!r}: log-probabilities are {found:.4f} nats a token from transformers' "
        f"own (limit {limit:.2g}) in every way of running the model; try student.dtype float32, and report the model"
    )


@torch.no_grad()
def mismatch(actor: Actor, rollout: Rollout, temperature: float) -> tuple[float, float]:
    """The larger of the mean |log pi sampled - log pi recomputed| and of |log pi recomputed - transformers'|, and the
    mean difference that rounding makes in transformers' own, over all ranks, nats a token; infinite where one is not a
    number."""
    recomputed_S, groups = actor.logprobs(rollout), rollout.groups()
    own_S = own_logprobs(actor.policy, groups, temperature)
    rounded_S = own_logprobs(actor.policy, groups, temperature, rounded=True)
    pairs = [(rollout.behavior_logprobs_S, recomputed_S), (own_S, recomputed_S), (rounded_S, own_S)]
    gaps = torch.stack([*((one_S - other_S).abs().sum() for one_S, other_S in pairs), rollout.lengths_B.sum().float()])
    *sums, tokens = distributed.sum_over_ranks(gaps).tolist()
    sampled, own, noise = (one / max(tokens, 1.0) for one in sums)
    worst = max(sampled, own)
    return (worst if sampled + own == sampled + own else float("inf")), (noise if noise == noise else 0.0)
