"""The checks of `training/main.py --doctor`. Each takes the patient and returns a finding; all ranks run each."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from configs.schema import RunConfig, as_dict
from inference.doctor import TOLERANCE
from inference.launch import SECRET, launcherless_environment
from training import distributed
from training.actor import Actor
from training.batch import Batch
from training.cli import ROOT, dump_config
from training.clock import Clock
from training.collect import Models, collect, make_experience, reward_of
from training.composite import LossWeights, UpdateInput
from training.experience import Experience, Rollout
from training.loop import describe, prompts_of_step, update
from training.recipes import RECIPES
from training.run import Setup
from training.run_folder import Progress

RELATIVE = {"float32": 1e-4, "bfloat16": 2e-2}
"""Largest difference of a loss or of a gradient norm between two ways of cutting one batch, relative."""
_UNCOMPARED = ("seconds", "learning_rate", "skipped")
_PLAIN_ROWS = 2
"""Responses of each prompt that are run again in a plain row."""
_DRAWS = "recipe sampled_ce draws teacher tokens for each row anew, so other rows have another loss"


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    passed: bool | None
    """None: the check could not be made."""
    text: str
    """The number and its limit, or why there is none."""


@dataclass(frozen=True)
class Patient:
    """The run under examination after its first step. Learning rates are 0: any number of steps leaves it as it is."""

    config: RunConfig
    setup: Setup
    models: Models
    weights: LossWeights
    """Of the loss's terms in that step."""
    batch: Batch
    """This rank's answers, scored and rewarded."""
    metrics: Mapping[str, float]
    """Of that step, over all ranks."""
    rollout: Rollout
    """This rank's prompts answered by the student alone, whatever the recipe."""
    local_teacher: bool
    """The teacher's server was started for this examination."""

    @property
    def actor(self) -> Actor:
        """The student."""
        return self.models.actor

    @property
    def nats(self) -> float:
        """Largest difference in log-probability between two ways of computing the same student's."""
        return TOLERANCE[self.config.student.dtype]


def first_step(setup: Setup, models: Models, *, local_teacher: bool) -> Patient:
    """Sample, score, reward and update, as the loop does. Collective."""
    config = setup.config
    weights = RECIPES[config.recipe].weights(config, 0, models.teacher.same_tokenizer)
    prompts = prompts_of_step(setup.inputs.corpus, config, 0)
    batch = collect(models, config, prompts, setup.inputs.corpus.prompts, 0, weights, Clock())
    rollout = models.actor.sample(prompts, step=0)
    patient = Patient(config, setup, models, weights, batch, {}, rollout, local_teacher)
    return replace(patient, metrics=step_metrics(patient, batch))


def step_metrics(patient: Patient, batch: Batch) -> dict[str, float]:
    """Advantages, losses and gradient norms of a batch. Collective."""
    progress = Progress(kl_coef=patient.config.ppo.kl_penalty)
    experience, dropped = make_experience(batch, patient.config, progress.kl_coef)
    corpus = patient.setup.inputs.corpus
    metrics = update(patient.models, experience, corpus, patient.config, progress, patient.weights)
    return metrics | describe(batch, experience, dropped)


def worst_change(one: Mapping[str, float], other: Mapping[str, float]) -> tuple[float, str]:
    """Largest relative change of a metric, and which. A loss near 0 (centred advantages) is measured against 1."""
    worst, name = 0.0, "grad_norm"
    for key in sorted(one.keys() | other.keys()):
        if key.startswith(_UNCOMPARED):
            continue
        if key not in one or key not in other:
            return math.inf, key
        scale = max(abs(one[key]), 1e-6 if "grad_norm" in key else 1.0)
        change = abs(one[key] - other[key]) / scale
        if not change <= worst:  # a NaN is the worst
            worst, name = change, key
    return worst, name


def _differences(patient: Patient, one_BR: torch.Tensor, other_BR: torch.Tensor) -> tuple[float, int]:
    """Largest difference on response tokens, over all ranks, and the number of tokens."""
    gap = (one_BR - other_BR)[patient.rollout.mask_BR].abs()
    # max() passes NaN on within a rank; infinity does so across ranks.
    worst = float(gap.max().nan_to_num(nan=math.inf)) if len(gap) else 0.0
    return distributed.max_over_ranks(worst), int(distributed.sum_over_ranks(torch.tensor(len(gap))))


def sampling(patient: Patient) -> Finding:
    """What the sampler recorded against the training forward."""
    found, tokens = _differences(
        patient, patient.rollout.behavior_logprobs_BR, patient.actor.logprobs(patient.rollout)
    )  # fmt: skip
    return Finding(
        found <= patient.nats,
        f"sampled and recomputed log-probabilities of {tokens} tokens differ by at most {found:.1e} nats "
        f"(allowed {patient.nats:.0e})",
    )


def ratio(patient: Patient) -> Finding:
    """The importance ratio of an update on fresh samples, by the update itself."""
    rollout = patient.rollout
    experience = Experience(rollout, torch.where(rollout.mask_BR, 1.0, 0.0), None, None)
    metrics = patient.actor.update([UpdateInput(experience, [], [], LossWeights(policy=1.0))], 0)
    away, clipped = math.expm1(metrics["mismatch/max"]), metrics["clip_share"]
    return Finding(
        away <= patient.nats and clipped == 0.0,
        f"at step 0 the ratio is 1 within {away:.1e} (allowed {patient.nats:.0e}), {clipped:.1%} of tokens clipped",
    )


def kl_to_teacher(patient: Patient) -> Finding:
    """The exact KL at each state that the student visited."""
    if not patient.models.teacher.same_tokenizer:
        return Finding(None, "different tokenizers: there is no exact KL over one vocabulary")
    view = patient.models.teacher.ask(patient.rollout, whole_distribution=True)()
    assert view.hidden_SD is not None
    kl_S = patient.actor.teacher_kl(patient.rollout, view.hidden_SD)[patient.rollout.mask_BR]
    least = -distributed.max_over_ranks(float((-kl_S).max().nan_to_num(nan=math.inf)))
    sums = distributed.sum_metrics({"kl": float(kl_S.sum()), "tokens": float(len(kl_S))})
    return Finding(
        least >= -1e-5,
        f"KL(student || teacher) is {sums['kl'] / sums['tokens']:.3f} nats a token on average and at least {least:.1e} "
        "(allowed -1e-05)",
    )


def kl_to_reference(patient: Patient) -> Finding:
    """At step 0 the reference is the student."""
    if patient.models.reference is None:
        return Finding(None, "this run has no reference")
    reference_BR = patient.models.reference.logprobs(patient.rollout)
    policy_BR = patient.actor.logprobs(patient.rollout)
    found, _ = _differences(patient, reference_BR, policy_BR)
    gap = (reference_BR - policy_BR)[patient.rollout.mask_BR]
    least = -distributed.max_over_ranks(-float((gap.expm1() - gap).min()))
    return Finding(
        found <= patient.nats and least >= -1e-6,
        f"KL(student || reference) by k3 is at least {least:.1e} (allowed -1e-06); at step 0 their log-probabilities "
        f"differ by at most {found:.1e} nats (allowed {patient.nats:.0e})",
    )


def padding(patient: Patient, extra: int = 5) -> Finding:
    """Reward, advantages and update with wider padding."""
    batch = patient.batch

    def wide(values_BR: torch.Tensor | None) -> Any:
        return None if values_BR is None else F.pad(values_BR, (0, extra))

    rollout = replace(
        batch.rollout,
        behavior_logprobs_BR=wide(batch.rollout.behavior_logprobs_BR),
        sampled_logprobs_BR=wide(batch.rollout.sampled_logprobs_BR),
    )
    view = replace(batch.view, logprobs_BR=wide(batch.view.logprobs_BR))
    names = ("old_BR", "reference_BR", "start_BR", "values_BR")
    padded = replace(
        batch, rollout=rollout, view=view, **{name: wide(getattr(batch, name)) for name in names},
        reward=reward_of(rollout, view, patient.config, patient.weights.single_step > 0),
    )  # fmt: skip
    return _same_step(patient, step_metrics(patient, padded), f"with {extra} slots of padding more")


def micro_batch(patient: Patient) -> Finding:
    """The update in rows of one group each, and in longer rows than configured."""
    if patient.config.recipe == "sampled_ce":
        return Finding(None, _DRAWS)
    metrics = {}
    configured = patient.config.actor.micro_batch_tokens
    for tokens in (1, 2 * configured):
        with _budget(patient, tokens):
            metrics[tokens] = step_metrics(patient, patient.batch)
    found = [_same_step(patient, m, f"in rows of {tokens} in place of {configured} tokens")
             for tokens, m in metrics.items()]  # fmt: skip
    return next((f for f in found if not f.passed), found[0])


@contextmanager
def _budget(patient: Patient, tokens: int) -> Iterator[None]:
    """Another micro_batch_tokens for actor and critic."""
    models: list[Any] = [m for m in (patient.models.actor, patient.models.critic) if m is not None]
    before = [model.budget.tokens for model in models]
    for model in models:
        model.budget.tokens = tokens
    try:
        yield
    finally:
        for model, old in zip(models, before, strict=True):
            model.budget.tokens = old


def _same_step(patient: Patient, metrics: Mapping[str, float], how: str) -> Finding:
    limit = RELATIVE[patient.config.student.dtype]
    change, name = worst_change(patient.metrics, metrics)
    return Finding(
        change <= limit,
        f"{how}, losses and gradient norm ({patient.metrics['grad_norm']:.4g}) change by at most {change:.1e} of "
        f"{name} (allowed {limit:.0e})",
    )


@torch.no_grad()
def packing(patient: Patient) -> Finding:
    """Grouped attention over packed rows against one plain row a response through transformers' own attention."""
    policy, rollout = patient.actor.policy, patient.rollout
    if not policy.grouped:
        return Finding(None, "this model is run in plain rows")
    packed_BR = patient.actor.logprobs(rollout)
    compared_BR = packed_BR.clone()
    model, device = policy.model, patient.actor.engine.device
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        for n, prompt in enumerate(rollout.prompts):
            rows = rollout.rows_of([n])
            for b in rows[:_PLAIN_ROWS]:  # as many on every rank: under ZeRO 3 each pass is a collective
                ids = torch.tensor([[*prompt.tokens, *rollout.responses[b]]], device=device)
                logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt.tokens) - 1 : -1].float()
                logprobs = (logits / patient.config.sampling.temperature).log_softmax(-1)
                labels = torch.tensor(rollout.responses[b], device=device)
                compared_BR[b, : len(labels)] = logprobs.gather(1, labels[:, None])[:, 0].cpu()
    finally:
        model.set_attn_implementation(implementation)
    found, _ = _differences(patient, packed_BR, compared_BR)
    each = min(_PLAIN_ROWS, rollout.group_size)
    responses = int(distributed.sum_over_ranks(torch.tensor(each * len(rollout.prompts))))
    return Finding(
        found <= patient.nats,
        f"{responses} responses packed and in plain rows of transformers differ by at most {found:.1e} nats "
        f"(allowed {patient.nats:.0e})",
    )


def ranks(patient: Patient) -> Finding:
    """The whole step, sampling and teacher included, by another number of ranks."""
    world = distributed.world_size()
    other = 2 if world == 1 else 1
    if patient.config.recipe == "sampled_ce":
        return Finding(None, _DRAWS)
    if torch.cuda.is_available():
        return Finding(None, "on CUDA, start the doctor with another number of ranks and compare")
    if patient.config.student.dtype != "float32":
        return Finding(None, "bfloat16 rounds otherwise in batches of another size, so other tokens are sampled")
    if patient.config.prompts_per_step % other:
        return Finding(None, f"{patient.config.prompts_per_step} prompts a step cannot be dealt to {other} ranks")
    if not distributed.is_main():
        return Finding(True, "")
    with tempfile.TemporaryDirectory(prefix="doctor-ranks-") as folder:
        try:
            metrics = _step_of(patient.config, other, Path(folder))
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            return Finding(False, f"{other} ranks could not take the step: {' '.join(str(error).split())[-300:]}")
    return _same_step(patient, metrics, f"with {other} in place of {world} ranks")


def _step_of(config: RunConfig, world: int, folder: Path) -> dict[str, float]:
    """Metrics of the same step by `world` processes of their own, which ask the same teacher."""
    (folder / "config.yaml").write_text(dump_config(as_dict(config)), encoding="utf-8")
    command = [sys.executable, str(ROOT / "training" / "doctor_rank.py"), str(folder)]
    shared = launcherless_environment() | {
        "WORLD_SIZE": str(world), "LOCAL_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(distributed.free_port()), SECRET: os.environ.get(SECRET, ""),
    }  # fmt: skip
    processes = []
    for rank in range(world):
        with (folder / f"rank{rank}.log").open("wb") as log:
            ours = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=ours, stdout=log, stderr=log))
    try:
        codes = [process.wait(1800) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(codes):
        raise ValueError((folder / f"rank{codes.index(max(codes, key=abs))}.log").read_text(errors="replace"))
    return json.loads((folder / "metrics.json").read_text())
