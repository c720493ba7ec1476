"""`training/main.py --doctor`: are the numbers of this run right? One line a check; nothing is trained or written.

It starts the configured run as a run does (same demo, same teacher server, same ranks), takes one step of few prompts
with learning rate 0, and takes it again in packed rows of other lengths. A check that cannot be made says why and is
not counted as passed. Exit code 0 unless a check fails.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from configs.schema import ExtraTeacherConfig, RunConfig
from inference.client import TeacherLost, TeacherRefused
from inference.model.backend import check_teacher, processes
from inference.model.files import end_ids
from inference.protocol.fingerprint import load_tokenizer, tokenizer_fingerprint
from inference.server.launch import SECRET, TeacherDied, start_local_teacher
from training import distributed
from training.collect import Run, Step, collect, make_experience
from training.data.order import items_of_step
from training.experience import Experience, Rewarded, Rollout, Scored
from training.loop import describe, update
from training.objective import LossWeights, UpdateInput
from training.recipes import RECIPES
from training.run import launcher
from training.run.cli import fail
from training.run.console import quiet_logging
from training.run.run_folder import RunFolder
from training.run.stopping import StopRequest
from training.stage2 import Setup, prepare, without_loop
from training.student.actor import Actor
from training.student.deepspeed_engine import start_distributed
from training.student.loading import NOISE, mean_gap, own_logprobs
from training.teacher.connect import connect, find_teacher
from training.teacher.facts import teacher_facts
from training.teacher.link import all_read

PROMPTS_PER_RANK = 4
"""Prompts of the step; at most what the run itself takes."""
TOLERANCE = {"float32": 2e-4, "bfloat16": 0.15}
"""Difference in log-probability, nats, between two ways of computing the same."""
RELATIVE = {"float32": 1e-4, "bfloat16": 2e-2}
"""Largest difference of a loss or of a gradient norm between two ways of cutting one batch, relative."""
_UNCOMPARED = ("seconds", "learning_rate", "skipped")


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    passed: bool | None
    """None: the check could not be made."""
    text: str
    """The number and its limit, or why there is none."""


@dataclass(frozen=True)
class Probe:
    """The run after its first step. Learning rates are 0: any number of steps leaves it as it is."""

    run: Run
    step: Step
    batch: Rewarded
    """This rank's answers, scored and rewarded."""
    rollout: Rollout
    """This rank's prompts answered by the student alone, whatever the recipe."""
    local_teacher: bool
    """The teacher's server was started for this."""
    metrics: Mapping[str, float]
    """Of that step, over all ranks."""

    @property
    def config(self) -> RunConfig:
        return self.run.config

    @property
    def actor(self) -> Actor:
        return self.run.models.actor

    @cached_property
    def nats(self) -> float:
        """Allowed difference in log-probability between two ways of computing the same student's: more where rounding
        changes more in transformers' own. Collective."""
        policy, groups, heat = self.actor.policy, self.rollout.groups(), self.config.sampling.temperature
        with torch.no_grad():
            pair = [own_logprobs(policy, groups, heat, rounded=rounded) for rounded in (True, False)]
        return max(TOLERANCE[self.config.student.dtype], NOISE * _differences(*pair)[0])


def doctor(config: RunConfig) -> int:
    """Run every check on the configured run; returns the exit code. Collective."""
    stop = StopRequest()
    launcher.watch_launcher()
    quiet_logging()
    with tempfile.TemporaryDirectory(prefix="doctor-") as folder, ExitStack() as stack:
        try:
            config, facts, inputs = prepare(config)
            setup = Setup(small_step(config), inputs, facts, RunFolder(Path(folder)), stop)
        except (ValueError, OSError) as error:
            fail(str(error))
        try:
            probe = start(setup, stack)
            found = [say_finding(name, check(probe)) for name, check in CHECKS.items()]
            return report(found + [one for extra in config.teachers for one in of_teacher(probe, extra, stack)])
        except (TeacherLost, TeacherRefused, TeacherDied) as error:
            _say(f"teacher        FAIL {' '.join(str(error).split())}")
            return 1


def small_step(config: RunConfig) -> RunConfig:
    """The same run with few prompts a step, one optimizer step on them, and a learning rate of 0."""
    world = launcher.environment_world_size()
    rank = min(PROMPTS_PER_RANK, config.prompts_per_step // world)
    return replace(
        config,
        prompts_per_step=max(rank, 1) * world,
        actor=replace(config.actor, learning_rate=0.0, updates_per_rollout=1),
        critic=replace(config.critic, learning_rate=0.0),
        loss=replace(config.loss, gradient_shares_every=0),
    )


def start(setup: Setup, stack: ExitStack) -> Probe:
    """Start the teacher and the models, and take the first step. Collective."""
    start_distributed()  # find_teacher is collective
    asked = setup.config.teacher
    # Found or started once, here, so that the checks can start other clients of the same server.
    address, secret = find_teacher(asked, setup.folder.path / "teacher", stack)
    os.environ[SECRET] = secret
    setup = replace(setup, config=replace(setup.config, teacher=replace(asked, address=address), teachers=()))
    return first_step(without_loop(setup, stack), local_teacher=asked.address is None)


def of_teacher(probe: Probe, teacher: ExtraTeacherConfig, stack: ExitStack) -> list[Finding]:
    """The checks that are of a teacher alone, for one of config.teachers; its name is behind theirs. Collective."""
    place = find_teacher(teacher, probe.run.folder.path / f"teacher-{teacher.name}", stack)
    link = connect(teacher, place, teacher_facts(probe.config, teacher), stack)
    models, config = replace(probe.run.models, teacher=link), replace(probe.config, teacher=teacher)
    mine = replace(probe, run=replace(probe.run, models=models, config=config), local_teacher=teacher.address is None)
    return [say_finding(f"{name} {teacher.name}", CHECKS[name](mine)) for name in ("tokenizer", "end symbols", "TP")]


def first_step(run: Run, *, local_teacher: bool) -> Probe:
    """Sample, score, reward and update, as the loop does. Collective."""
    step = Step.of(run)
    prompts = items_of_step(run.corpus.prompts, run.config.prompts_per_step, 0, run.config.seed)
    batch, rollout = collect(run, prompts, step), run.models.actor.sample(prompts, step=0)
    return Probe(run, step, batch, rollout, local_teacher, step_metrics(run, step, batch))


def step_metrics(run: Run, step: Step, batch: Rewarded) -> dict[str, float]:
    """Advantages, losses and gradient norms of a batch. Collective."""
    experience, dropped = make_experience(run, batch, run.config.ppo.kl_penalty)
    return update(run, experience, step) | describe(batch, dropped)


def say_finding(name: str, finding: Finding) -> Finding:
    """Print its line; what all ranks make of it. Collective."""
    if finding.passed is not None:  # one bad rank is enough
        finding = replace(finding, passed=not distributed.any_rank(not finding.passed))
    word = {True: "pass", False: "FAIL", None: "skipped:"}[finding.passed]
    _say(f"{name:14} {word} {finding.text}")
    return finding


def report(findings: list[Finding]) -> int:
    """The last line, and the exit code."""
    counts = [sum(f.passed is value for f in findings) for value in (True, False, None)]
    _say(f"{'':14} {counts[0]} passed, {counts[1]} failed, {counts[2]} skipped")
    return 1 if counts[1] else 0


def _say(line: str) -> None:
    if launcher.environment_rank() == 0:
        print(line, flush=True)


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


def _differences(one_S: torch.Tensor, other_S: torch.Tensor) -> tuple[float, int]:
    """Largest difference over all ranks, and the number of tokens."""
    gap = (one_S - other_S).abs()
    # max() passes NaN on within a rank; infinity does so across ranks.
    worst = float(gap.max().nan_to_num(nan=math.inf)) if len(gap) else 0.0
    return distributed.max_over_ranks(worst), int(distributed.sum_over_ranks(torch.tensor(len(gap))))


def sampling(probe: Probe) -> Finding:
    """What the sampler recorded against the training forward."""
    found, tokens = _differences(probe.rollout.behavior_logprobs_S, probe.actor.logprobs(probe.rollout))
    return Finding(
        found <= probe.nats,
        f"sampled and recomputed log-probabilities of {tokens} tokens differ by at most {found:.1e} nats "
        f"(allowed {probe.nats:.0e})",
    )


def ratio(probe: Probe) -> Finding:
    """The importance ratio of an update on fresh samples, by the update itself."""
    alone = replace(
        probe.batch, scored=Scored(probe.rollout, all_read(probe.rollout, probe.actor.logprobs(probe.rollout)))
    )
    experience = Experience(alone, torch.ones_like(probe.rollout.behavior_logprobs_S))
    metrics = probe.actor.update([UpdateInput(experience, [], [], LossWeights(policy=1.0))], 0)
    away, clipped = math.expm1(metrics["mismatch/max"]), metrics["clip_share"]
    return Finding(
        away <= probe.nats and clipped == 0.0,
        f"at step 0 the ratio is 1 within {away:.1e} (allowed {probe.nats:.0e}), {clipped:.1%} of tokens clipped",
    )


def kl_to_teacher(probe: Probe) -> Finding:
    """The exact KL at each state that the student visited."""
    if not probe.run.models.teacher.facts.same_tokenizer:
        return Finding(None, "different tokenizers: there is no exact KL over one vocabulary")
    view = probe.run.models.teacher.ask(probe.rollout, whole_distribution=True)()
    if view.hidden_SD is None:
        return Finding(None, "not checked: the teacher's backend gives no hidden states")
    kl_S = probe.actor.teacher_kl(probe.rollout, view.hidden_SD)
    least = -distributed.max_over_ranks(float((-kl_S).max().nan_to_num(nan=math.inf)))
    sums = distributed.sum_metrics({"kl": float(kl_S.sum()), "tokens": float(len(kl_S))})
    return Finding(
        least >= -1e-5,
        f"KL(student || teacher) is {sums['kl'] / sums['tokens']:.3f} nats a token on average and at least {least:.1e} "
        "(allowed -1e-05)",
    )


def kl_to_reference(probe: Probe) -> Finding:
    """At step 0 the reference is the student."""
    if probe.run.models.reference is None:
        return Finding(None, "this run has no reference")
    reference_S = probe.run.models.reference.logprobs(probe.rollout)
    policy_S = probe.actor.logprobs(probe.rollout)
    found, _ = _differences(reference_S, policy_S)
    gap = reference_S - policy_S
    least = -distributed.max_over_ranks(-float((gap.expm1() - gap).min()))
    return Finding(
        found <= probe.nats and least >= -1e-6,
        f"KL(student || reference) by k3 is at least {least:.1e} (allowed -1e-06); at step 0 their log-probabilities "
        f"differ by at most {found:.1e} nats (allowed {probe.nats:.0e})",
    )


def micro_batch(probe: Probe) -> Finding:
    """The update in rows of one group each, and in longer rows than configured."""
    if RECIPES[probe.config.recipe].draws:
        return Finding(None, "recipe sampled_ce draws for each row anew, so other rows have another loss")
    found, configured = [], probe.config.actor.micro_batch_tokens
    limit = RELATIVE[probe.config.student.dtype]
    for tokens in (1, 2 * configured):
        with _rows_of(probe, tokens):
            metrics = step_metrics(probe.run, probe.step, probe.batch)
        change, name = worst_change(probe.metrics, metrics)
        text = (
            f"in rows of {tokens} in place of {configured} tokens, losses and gradient norm "
            f"({probe.metrics['grad_norm']:.4g}) change by at most {change:.1e} of {name} (allowed {limit:.0e})"
        )
        found.append(Finding(change <= limit, text))
    return next((f for f in found if not f.passed), found[0])


@contextmanager
def _rows_of(probe: Probe, tokens: int) -> Iterator[None]:
    """Another micro_batch_tokens for actor and critic."""
    models: list[Any] = [m for m in (probe.run.models.actor, probe.run.models.critic) if m is not None]
    before = [model.engine.passes.tokens for model in models]
    for model in models:
        model.engine.passes.tokens = tokens
    try:
        yield
    finally:
        for model, old in zip(models, before, strict=True):
            model.engine.passes.tokens = old


@torch.no_grad()
def packing(probe: Probe) -> Finding:
    """Grouped attention over packed rows against one plain row a response through transformers' own attention."""
    policy, rollout = probe.actor.policy, probe.rollout
    if not policy.grouped:
        return Finding(None, "this model is run in plain rows")
    own_S = own_logprobs(policy, rollout.groups(), probe.config.sampling.temperature)
    found, _ = _differences(probe.actor.logprobs(rollout), own_S)
    responses = int(distributed.sum_over_ranks(torch.tensor(len(rollout.responses_B))))
    return Finding(
        found <= probe.nats,
        f"{responses} responses packed and as transformers runs them differ by at most {found:.1e} nats "
        f"(allowed {probe.nats:.0e})",
    )


def tensor_parallel(probe: Probe) -> Finding:
    """The teacher's scores of the same responses with another number of processes."""
    teacher, link = probe.config.teacher, probe.run.models.teacher
    if not probe.local_teacher:
        return Finding(None, "not checked: remote teacher")
    here = teacher.tensor_parallel
    other, path = (1 if here > 1 else 2), Path(teacher.path)
    again = replace(teacher, tensor_parallel=other, address=None, port=0)
    try:
        again = replace(again, backend=check_teacher(again)[0])
    except ValueError:
        return Finding(None, f"the teacher's heads cannot be dealt to {other} processes")
    if other > 1 and processes(again) == 1:
        return Finding(None, f"not checked: the {again.backend} backend has one process")
    if not distributed.is_main():
        return Finding(True, "")
    rollout, limit = probe.rollout, TOLERANCE[teacher.dtype]
    with start_local_teacher(again, path, probe.run.folder.path / "teacher-again") as server:
        facts = teacher_facts(probe.config, teacher)
        with ExitStack() as stack:
            other_link = connect(teacher, (server.address, server.secret), facts, stack)
            theirs_S = other_link.ask(rollout, whole_distribution=False)().logprobs_S
    ours_S = link.ask(rollout, whole_distribution=False)().logprobs_S
    gap = mean_gap(ours_S, theirs_S)
    return Finding(
        gap <= limit,
        f"the teacher on {here} and on {other} processes: log-probabilities differ by {gap:.1e} nats a token "
        f"(allowed {limit:.0e})",
    )


def tokenizers(probe: Probe) -> Finding:
    """Whether a token id means the same to both, and what is done where it does not."""
    student, teacher = probe.config.student.path, probe.config.teacher.path
    prints = tokenizer_fingerprint(student), tokenizer_fingerprint(teacher)
    taken_for_one = probe.run.models.teacher.facts.same_tokenizer
    if prints[0] == prints[1]:
        return Finding(taken_for_one, f"one tokenizer ({prints[0][:8]}): student tokens are teacher tokens")
    if taken_for_one:
        return Finding(False, f"two tokenizers ({prints[0][:8]}, {prints[1][:8]}), but the run takes them for one")
    other = probe.run.models.teacher.facts.teacher
    texts = [prompt.text for prompt in probe.rollout.prompts_N]
    changed = [t for t in texts if other.said(other.tokenizer(t)["input_ids"]) != t.strip()]
    return Finding(
        not changed,
        f"two tokenizers ({prints[0][:8]}, {prints[1][:8]}): text is tokenised again for the teacher, "
        f"whose scores come back token for token; {len(changed)} of {len(texts)} prompts change on the way (allowed 0)",
    )


def named_end_tokens(path: str | Path) -> tuple[int, ...]:
    """Every end symbol that a model directory names: generation_config.json, config.json, the tokenizer."""
    own = load_tokenizer(path).eos_token_id
    return tuple(sorted({*end_ids(Path(path)), *([] if own is None else [own])}))


def end_symbols(probe: Probe) -> Finding:
    """Trap: a student that ends otherwise than its teacher learns never to end."""
    ours, theirs = probe.actor.end_tokens, named_end_tokens(probe.config.teacher.path)
    teacher = load_tokenizer(probe.config.teacher.path)

    def names(tokenizer: Any, ids: tuple[int, ...]) -> str:
        return ", ".join(f"{tokenizer.convert_ids_to_tokens(i)} ({i})" for i in ids) or "none"

    both = f"student ends with {names(probe.actor.tokenizer, ours)}; teacher with {names(teacher, theirs)}"
    if probe.run.models.teacher.facts.same_tokenizer:
        strange = sorted(set(ours) - set(theirs) - set(probe.run.models.teacher.facts.exchanged))
        return Finding(not strange, f"{both}; {len(strange)} of the student's are unknown to the teacher (allowed 0)")
    return Finding(teacher.eos_token_id is not None, f"{both}; each side's own stands for the other's")


CHECKS: dict[str, Callable[[Probe], Finding]] = {
    "tokenizer": tokenizers,
    "end symbols": end_symbols,
    "sampling": sampling,
    "ratio": ratio,
    "KL teacher": kl_to_teacher,
    "KL reference": kl_to_reference,
    "micro-batch": micro_batch,
    "packing": packing,
    "TP": tensor_parallel,
}
"""By the name that its line starts with, in order."""
