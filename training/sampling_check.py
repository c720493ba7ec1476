"""The safety net under sampling: at start-up, is what was sampled what the training forward believes?

Injected kernels have given gibberish for some models (DeepSpeed issues 4788, 4954, 8263), and a wrong mask or position
would not show in a loss curve for days. A sampler that fails is left for the next safer one, and the log says so:
another engine for our grouped sampler, that for plain rows.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from configs.schema import RunConfig, SamplingConfig
from training import distributed
from training.actor import Actor
from training.experience import Prompt, Rollout

log = logging.getLogger(__name__)
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}
"""Nats a token, mean absolute difference of sampled and recomputed log-probabilities."""
TOKENS = 16
"""Longest probe."""


class SamplingBroken(ValueError):
    """No way of sampling agrees with the training forward."""


def check_sampling(actor: Actor, prompts: Sequence[Prompt], config: RunConfig) -> float:
    """Probe the actor's sampler on a few prompts and leave it for a safer one where it fails. Collective.

    Returns the mismatch of the sampler that stays, nats a token. Raises SamplingBroken where none agrees.
    """
    probe = replace(
        config.sampling, group_size=4, max_new_tokens=min(TOKENS, config.sampling.max_new_tokens), top_k=0, top_p=1.0,
        min_p=0.0,
    )  # fmt: skip
    limit = TOLERANCE[config.student.dtype]
    if actor.rollout is not None:
        gap, z, failure = _other_engine(actor, prompts, probe, config)
        if not failure and (abs(gap) <= 0.05 or abs(z) <= 6):
            return abs(gap)
        reason = failure or (
            f"its samples are {gap:.3f} nats a token from what the student would draw ({z:.0f} standard errors)"
        )
        log.warning("rollout engine %s: %s; the actor goes native", actor.rollout.name, reason)
        actor.rollout = None
        actor.engine.go_native()
    found = mismatch(actor, actor.sample(prompts, step=-1, sampling=probe))
    if found <= limit:
        return found
    if actor.policy.grouped:
        log.warning(
            "sampled log-probabilities are %.4f nats a token from the training forward's (limit %g): the actor leaves "
            "packed rows for plain ones", found, limit,
        )  # fmt: skip
        actor.policy.use_plain_rows()
        found = mismatch(actor, actor.sample(prompts, step=-1, sampling=probe))
    if found > limit:
        raise SamplingBroken(
            f"student.path = {config.student.path!r}: sampled log-probabilities are {found:.4f} nats a token from the "
            f"training forward's (limit {limit:g}), in plain rows too; try student.dtype float32, and report the model"
        )
    return found


def _other_engine(
    actor: Actor, prompts: Sequence[Prompt], probe: SamplingConfig, config: RunConfig
) -> tuple[float, float, str]:
    """`calibration` of another engine's samples, or why there are none: injected kernels may know an older model
    library, whose layers returned something else. Collective: it has failed if it has on any rank."""
    failure, rollout = "", None
    try:
        rollout = actor.sample(prompts, step=-1, sampling=probe)
    except Exception as error:
        failure = f"it failed ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
    if distributed.any_rank(rollout is None) or rollout is None:
        return float("inf"), float("inf"), failure or "it failed on another rank"
    return *calibration(actor, rollout, config), failure


def mismatch(actor: Actor, rollout: Rollout) -> float:
    """Mean |log pi sampled - log pi recomputed| over all ranks, nats a token; infinite where one is not a number."""
    gap_BR = (rollout.behavior_logprobs_BR - actor.logprobs(rollout)).abs()
    sums = distributed.sum_metrics({"gap": float(gap_BR.sum()), "tokens": float(rollout.lengths_B.sum())})
    mean = sums["gap"] / max(sums["tokens"], 1.0)
    return mean if mean == mean else float("inf")


def calibration(actor: Actor, rollout: Rollout, config: RunConfig) -> tuple[float, float]:
    """For an engine that says no log-probabilities: mean of log pi(y_t) + H(pi) over its tokens, and its z-score.

    Tokens that were drawn from pi have -H(pi) as the mean of their log-probability at each state; gibberish is far
    less likely, and tokens of a sharper distribution far likelier.
    """
    surprise_BR = actor.logprobs(rollout) + actor.entropies(rollout)
    kept = surprise_BR[rollout.mask_BR].double()
    sums = distributed.sum_metrics(
        {"n": float(len(kept)), "sum": float(kept.sum()), "squares": float(kept.square().sum())}
    )
    n = max(sums["n"], 1.0)
    mean = sums["sum"] / n
    deviation = max(sums["squares"] / n - mean * mean, 1e-12) ** 0.5
    z = mean / (deviation / n**0.5)
    return (mean, z) if torch.isfinite(torch.tensor(z)) else (float("inf"), float("inf"))
