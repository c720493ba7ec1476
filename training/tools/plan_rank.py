"""Memory of one trainer rank by part and by moment, for one configuration and number of ranks."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from configs.schema import AdapterConfig, RunConfig, SamplingConfig, StudentConfig, TeacherConfig
from inference.attention.packing import Group, PackedRow, pack_row
from inference.model.families import Architecture
from training.algorithms import has_critic, has_reference
from training.losses import OutputLayer, WholeDistribution, reverse_kl_term
from training.objective import pt_coef
from training.recipes import RECIPES
from training.student.policy import Policy
from training.tools.plan_trace import (
    META,
    UpdatePeaks,
    forward_peak,
    longest_row,
    meta_policy,
    sampling_peak,
    update_peaks,
)
from training.tools.plan_zero import (
    PERSISTENT,
    Device,
    EngineSettings,
    Parameters,
    engine_state,
    forward_extra,
    update_peak,
)

DEPTHS = (2, 4)
"""Deeper models are traced at these two depths and continued in a straight line: every layer costs the same."""
MIXED_DEPTHS = (6, 12)
"""The same where layers differ (Gemma 3: five with a window, then one without)."""


@dataclass(frozen=True, eq=False)
class ModelFacts:
    """What is known of the models from their config.json."""

    student: Any
    """transformers' configuration of the student's text model."""
    teacher: Architecture | Any
    """Megatron's, or transformers' configuration of a text model that transformers runs."""
    same_tokenizer: bool
    """Student tokens are teacher tokens: the trainer then holds the teacher's output layer."""
    prompt_tokens: int
    """Longest prompt that the data settings and all contexts allow; every prompt is taken to have it."""
    others: tuple[tuple[str, TeacherConfig, Architecture | Any], ...] = ()
    """The further teachers: whose settings, those, and what `teacher` is of the first."""


@dataclass(frozen=True)
class RankMemory:
    """One rank, bytes."""

    static: dict[str, int]
    """What is there all the time, by part."""
    moments: dict[str, int]
    """What each moment of a step takes on top, at its worst."""
    host: int
    """Offloaded optimizer state, in host memory."""

    @property
    def total(self) -> int:
        """The static parts and the worst moment."""
        return sum(self.static.values()) + max(self.moments.values())


def parameters_of(module: nn.Module) -> Parameters:
    """Sizes for DeepSpeed's arithmetic."""
    every = [p.numel() for p in module.parameters()]
    trained = [p.numel() for p in module.parameters() if p.requires_grad]
    return Parameters(
        total=sum(every),
        trainable=sum(trained),
        largest=max(trained, default=0),
        small=sum(n for n in every if n < PERSISTENT),
        element=next(module.parameters()).element_size(),
    )


def reference_copies(config: RunConfig) -> int:
    """Frozen copies of the student, as training/stage2.py and training/student/reference.py make them."""
    limited, fixed = config.reference.kl_limit is not None, config.reference.update == "fixed"
    copies = int(has_reference(config) or (limited and fixed)) + int(limited and not fixed)
    switched_off = config.student.adapter.rank > 0 and fixed and config.loss.kl_estimator != "full"
    return 0 if switched_off else copies


class Tracer:
    """Traces of the student and the critic on the meta device, each made once."""

    def __init__(self, facts: ModelFacts, student: StudentConfig) -> None:
        self.facts, self._student = facts, student
        self.student = parameters_of(self._policy(False))
        self.critic = parameters_of(self._value(None))

    @functools.cache  # noqa: B019 - lives as long as the plan
    def _policy(self, checkpointing: bool, layers: int | None = None) -> Policy:
        return meta_policy(self.facts.student, replace(self._student, gradient_checkpointing=checkpointing), layers)

    @functools.cache  # noqa: B019
    def _value(self, layers: int | None, checkpointing: bool = False) -> nn.Module:
        from training.student.critic import ValueModel

        whole = replace(self._student, gradient_checkpointing=checkpointing, adapter=AdapterConfig())
        policy = meta_policy(self.facts.student, whole, layers)
        with META:
            return ValueModel(policy.model.base_model, self.facts.student.hidden_size)

    def update(self, config: RunConfig, prompts: int, blocks: int) -> UpdatePeaks:
        """The worse of the actor's packed row of so many prompts and of one of so many L_PT blocks (0: none)."""
        rows = [self._policy_row(config, prompts)] + ([self._text_row(config, blocks)] if blocks else [])
        return UpdatePeaks(*(max(each) for each in zip(*rows, strict=True)))

    @functools.cache  # noqa: B019
    def _policy_row(self, config: RunConfig, prompts: int) -> UpdatePeaks:
        term = RECIPES[config.recipe].weights(config, 0, self.facts.same_tokenizer).single_step > 0
        return self._student_update(config, self._row(config, prompts), term)

    @functools.cache  # noqa: B019
    def _text_row(self, config: RunConfig, blocks: int) -> UpdatePeaks:
        block = Group((0,), ((0,) * (config.data.text_block_tokens - 1),))
        return self._student_update(config, pack_row([block] * blocks), False)

    def _student_update(self, config: RunConfig, row: PackedRow, term: bool) -> UpdatePeaks:
        def trace(layers: int | None) -> UpdatePeaks:
            policy = self._policy(config.student.gradient_checkpointing, layers)
            return update_peaks(policy, lambda: self._loss(policy, row, config, term))

        return UpdatePeaks(*self._at_depth(trace))

    @functools.cache  # noqa: B019
    def critic_update(self, config: RunConfig, prompts: int) -> UpdatePeaks:
        """The critic's."""
        row = self._row(config, prompts)

        def trace(layers: int | None) -> UpdatePeaks:
            module = self._value(layers, config.student.gradient_checkpointing)
            return update_peaks(module, lambda: module(row).sum())

        return UpdatePeaks(*self._at_depth(trace))

    @functools.cache  # noqa: B019
    def forward(self, config: RunConfig, prompts: int) -> int:
        """A pass without gradients (reference, evaluation)."""
        row, term = self._row(config, prompts), self.facts.same_tokenizer

        def trace(layers: int | None) -> tuple[int, ...]:
            policy = self._policy(False, layers)
            return (forward_peak(policy, lambda: self._loss(policy, row, config, term)),)

        return self._at_depth(trace)[0]

    def sampling(self, sampling: SamplingConfig, prompts: int, graph: bool) -> int:
        """So many prompts answered together; from the second on, each costs the same. `graph`: a CUDA graph of the step
        holds what the step makes in memory of its own, beside that of the step before it was captured."""
        one, two = (peak + graph * step for peak, step in (self._sampling(sampling, n) for n in (1, 2)))
        return one + (two - one) * (prompts - 1)

    @functools.cache  # noqa: B019
    def _sampling(self, sampling: SamplingConfig, prompts: int) -> tuple[int, ...]:
        def trace(layers: int | None) -> tuple[int, ...]:
            return sampling_peak(self._policy(False, layers), sampling, prompts, self.facts.prompt_tokens)

        return self._at_depth(trace)

    def _at_depth(self, trace: Callable[[int | None], tuple[int, ...]]) -> tuple[int, ...]:
        """A trace of the whole model, or its continuation from two shallow ones."""
        model = self.facts.student
        mixed = len(set(getattr(model, "layer_types", None) or ())) > 1
        low_depth, high_depth = MIXED_DEPTHS if mixed else DEPTHS
        if model.num_hidden_layers <= MIXED_DEPTHS[1]:
            return trace(None)
        low, high = trace(low_depth), trace(high_depth)
        step = (model.num_hidden_layers - high_depth) / (high_depth - low_depth)
        return tuple(round(deep + (deep - flat) * step) for flat, deep in zip(low, high, strict=True))

    def _row(self, config: RunConfig, prompts: int) -> PackedRow:
        return longest_row(config, prompts, self.facts.prompt_tokens)

    def _loss(self, policy: Policy, row: PackedRow, config: RunConfig, term: bool) -> torch.Tensor:
        teacher, terms = self.facts.teacher, {}
        if term:
            hidden = torch.empty(len(row.labels_S), teacher.hidden_size, device=META)
            output = torch.empty(teacher.vocab_size, teacher.hidden_size, device=META)
            hidden = hidden * 1.0  # counted: the row's part is moved to the device; the output layer is held already
            terms["single_step"] = reverse_kl_term(WholeDistribution(hidden, OutputLayer(output)))
        out = policy(row, temperature=config.sampling.temperature, terms=terms)
        return out.logprobs_S.sum() + sum(value.sum() for value in out.terms.values())


def rank_memory(config: RunConfig, tracer: Tracer, world: int, device: Device = "cuda") -> RankMemory:
    """One of `world` trainer ranks, the algorithm being config.algo."""
    facts, element = tracer.facts, tracer.student.element
    actor = EngineSettings(config.actor.zero_stage, world, config.actor.offload, device)
    kept, host = engine_state(tracer.student, actor)
    static = {f"student: {part}": size for part, size in kept.items()}
    if reference_copies(config):
        static["reference"] = reference_copies(config) * element * tracer.student.total
    if facts.same_tokenizer:
        static["teacher's output layer"] = 4 * facts.teacher.vocab_size * facts.teacher.hidden_size
    mine = -(-config.prompts_per_step // world)
    mini = -(-mine // config.actor.updates_per_rollout)
    row_prompts, rows = rows_of(config, facts.prompt_tokens, mini)
    key, blocks = _trace_key(config), _text_blocks(config, world)
    questions = replace(config.sampling, group_size=config.eval.kl_samples)
    # The number of held-out questions is not known here unless it is set.
    held = config.eval.batch if config.eval.questions is None else -(-config.eval.questions // world)
    extra = forward_extra(tracer.student, actor)
    graph = device == "cuda" and actor.zero_stage < 3  # as training/student/sampling.py's `stays_on_device`
    together = min(mine, config.sampling.prompts_at_once or mine)
    moments = {
        "sampling": tracer.sampling(config.sampling, together, graph and not config.sampling.teacher_mix) + extra,
        "reference, evaluation passes": tracer.forward(key, row_prompts) + extra,
        "update": update_peak(tracer.student, actor, tracer.update(key, row_prompts, blocks), rows),
        "evaluation": tracer.sampling(questions, min(config.eval.batch, held), graph) + extra,
    }
    if has_critic(config):
        engine = replace(actor, zero_stage=config.critic.zero_stage)
        kept, offloaded = engine_state(tracer.critic, engine)
        static |= {f"critic: {part}": size for part, size in kept.items()}
        host += offloaded
        moments["critic's update"] = update_peak(tracer.critic, engine, tracer.critic_update(key, row_prompts), rows)
    return RankMemory({k: v for k, v in static.items() if v}, moments, host)


def rows_of(config: RunConfig, prompt_tokens: int, prompts: int) -> tuple[int, int]:
    """(prompts in the longest packed row, rows of an optimizer step) where every group has its full length."""
    sampling = config.sampling
    group = prompt_tokens + sampling.group_size * (sampling.max_new_tokens - 1)
    fit = min(max(config.actor.micro_batch_tokens // group, 1), prompts)
    extra = (pt_coef(config) > 0) + (config.loss.bc_coef > 0)  # L_PT and L_BC have rows of their own
    return fit, -(-prompts // fit) + extra


def _text_blocks(config: RunConfig, world: int) -> int:
    """L_PT blocks in this rank's longest packed row."""
    if pt_coef(config) == 0:
        return 0
    mine = -(-config.loss.pt_batch // world)
    return min(max(config.actor.micro_batch_tokens // (config.data.text_block_tokens - 1), 1), mine)


def _trace_key(config: RunConfig) -> RunConfig:
    """What does not change a trace is set to its default, so that stages and offload share traces."""
    plain = RunConfig()
    actor = replace(plain.actor, micro_batch_tokens=config.actor.micro_batch_tokens)
    return replace(config, algo="grpo", actor=actor, critic=plain.critic, eval=plain.eval, loss=config.loss)


def alternatives(config: RunConfig, *, offload: bool) -> Sequence[tuple[str, RunConfig]]:
    """Other settings that need less memory, the cheaper first: (what to set, the configuration)."""
    found = []
    batches = sorted({config.eval.batch, min(config.eval.batch, 8)}, reverse=True)
    budgets = sorted({config.actor.micro_batch_tokens, min(config.actor.micro_batch_tokens, 2048)}, reverse=True)
    checkpoints = sorted({config.student.gradient_checkpointing, True})
    stages: tuple[Literal[1, 2, 3], ...] = (1, 2) if config.loss.gradient_shares_every else (1, 2, 3)
    for budget, batch, checkpointing, stage in itertools.product(budgets, batches, checkpoints, stages):
        changed = replace(
            config,
            student=replace(config.student, gradient_checkpointing=checkpointing),
            actor=replace(config.actor, zero_stage=stage, offload=offload, micro_batch_tokens=budget),
            critic=replace(config.critic, zero_stage=stage),
            eval=replace(config.eval, batch=batch),
        )
        flags = [f"--actor.zero_stage {stage}"] * (stage != config.actor.zero_stage)
        flags += [f"--critic.zero_stage {stage}"] * (has_critic(config) and stage != config.critic.zero_stage)
        flags += ["--student.gradient_checkpointing true"] * (checkpointing > config.student.gradient_checkpointing)
        flags += ["--actor.offload true"] * (offload > config.actor.offload)
        flags += [f"--eval.batch {batch}"] * (batch != config.eval.batch)
        flags += [f"--actor.micro_batch_tokens {budget}"] * (budget != config.actor.micro_batch_tokens)
        found.append((" ".join(flags), changed))
    return found
