"""The actor: the student under DeepSpeed's hybrid engine. It samples and it trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import GenerationConfig

from configs.prompts import Format
from configs.schema import RunConfig, SamplingConfig
from inference.attention.packing import PackedRow
from rewards.lpt_reward import lpt_loss
from training import distributed
from training.data.order import random_stream
from training.data.prompts import format_of
from training.experience import Prompt, Rollout, Scored
from training.losses import (
    OutputLayer,
    PolicyTokens,
    TokenTerm,
    WholeDistribution,
    k3,
    kl_loss,
    policy_loss,
    reverse_kl_term,
    tail_kl_term,
    token_weights,
)
from training.objective import TERMS, LossWeights, UpdateInput, counts_of
from training.recipes import RECIPES
from training.run.safe_points import nothing
from training.student.adapters import adapter_off
from training.student.deepspeed_engine import Engine, Job, Optimisation
from training.student.loading import load_policy
from training.student.passes import each_token, rows_in_step
from training.student.policy import Policy
from training.student.sampling import Drawing, Mixture, sample


class Actor:
    """Samples from the student, trains it, saves it. Methods marked collective are called by all ranks together."""

    def __init__(
        self, config: RunConfig, *, total_steps: int, learning_rate: float, teacher_head: OutputLayer | None = None
    ) -> None:
        self._config, student = config, config.student
        self.path, self.dtype = Path(student.path), student.dtype
        self.asked = format_of("student", student, config.data)
        """How the student is asked."""
        self.tokenizer = self.asked.tokenizer
        policy = load_policy(
            student.path, student.dtype, gradient_checkpointing=student.gradient_checkpointing, adapter=student.adapter
        )
        if student.adapter.rank == 0 and getattr(policy.model, "hf_quantizer", None) is not None:
            raise ValueError(
                f"student.path = {student.path!r}: its weights are quantised, and only an adapter beside them can be "
                "trained; set student.adapter.rank, or give the unquantised checkpoint"
            )
        self.end_tokens = end_tokens(policy, self.asked)
        """Whatever ends a response."""
        if config.actor.zero_stage == 3:
            policy.agree = lambda tokens: int(distributed.max_over_ranks(tokens))
        options = Optimisation(learning_rate, total_steps, config.actor.zero_stage, student.dtype, samples=True)
        self.engine = Engine(policy, config.actor, options)
        self.engine.module.eval()
        self.on_step: Callable[[int], None] = lambda _: distributed.beat()
        """Called after each decoding step."""
        self.teacher_head = teacher_head
        """What makes the teacher's logits of its hidden states, for the student's vocabulary and on its device."""
        if teacher_head is not None:
            policy.limit(len(teacher_head.weight_VD))
            shared_VD, device = teacher_head.weight_VD[: policy.columns], self.engine.device
            unknown_V = None if policy.unknown_V is None else policy.unknown_V[: len(shared_VD)].to(device)
            self.teacher_head = replace(teacher_head, weight_VD=shared_VD.to(device), unknown_V=unknown_V)

    @property
    def policy(self) -> Policy:
        module = self.engine.module
        assert isinstance(module, Policy)
        return module

    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        step: int,
        sampling: SamplingConfig | None = None,
        greedy: bool = False,
        mixture: Mixture | None = None,
    ) -> Rollout:
        """Answer this rank's prompts; seeds are (config.seed, step, prompt index). Collective under ZeRO 3."""
        sampling = sampling or self._config.sampling
        with self.engine.whole():
            drawing = Drawing(
                end_tokens=self.end_tokens,
                generators=None if greedy else [random_stream(self._config.seed, step, p.index) for p in prompts],
                any_rank=distributed.any_rank if self.engine.zero_stage == 3 else bool,
                on_step=self.on_step,
                mixture=mixture,
            )
            samples = sample(self.policy, [p.tokens for p in prompts], sampling, drawing)
        texts_B = [self.asked.said(response) for response in samples.responses_B]
        return Rollout(prompts_N=list(prompts), group_size=sampling.group_size, texts_B=texts_B, **vars(samples))

    def logprobs(
        self, rollout: Rollout, *, start_of_run: bool = False, temperature: float | None = None
    ) -> torch.Tensor:
        """log pi of the response tokens by the training forward, float32 [S], at the sampling temperature.

        `start_of_run`: with the adapter switched off. Collective.
        """
        scale = self._config.sampling.temperature if temperature is None else temperature
        with adapter_off(self.policy.model) if start_of_run else nullcontext():
            return each_token(
                self.engine.passes, rollout.groups(), lambda row: self.policy(row, temperature=scale).logprobs_S
            )

    def teacher_kl(self, rollout: Rollout, teacher_hidden_SD: torch.Tensor) -> torch.Tensor:
        """Exact KL(student || teacher) before each response token, nats, float32 [S]. Temperature 1. Collective."""

        def one(row: PackedRow) -> torch.Tensor:
            terms = {"kl": reverse_kl_term(self._teacher(teacher_hidden_SD, row))}
            return self.policy(row, terms=terms).terms["kl"]

        return each_token(self.engine.passes, rollout.groups(), one)

    def _teacher(self, hidden_SD: torch.Tensor, row: PackedRow) -> WholeDistribution:
        """The teacher's distribution before the row's response tokens."""
        assert self.teacher_head is not None
        return WholeDistribution(self.engine.of_row(row, hidden_SD), self.teacher_head)

    def update(
        self,
        batches: Sequence[UpdateInput],
        step: int,
        *,
        shares: bool = False,
        between: Callable[[], None] = nothing,
    ) -> dict[str, float]:
        """One optimizer step for each mini-batch. Metrics are over all ranks. Collective.

        `shares`: measure each term's gradient on the first mini-batch as well.
        `between` is called before each pass of the first mini-batch, and may raise: nothing has changed then.
        """
        found: dict[str, list[float]] = {}
        for i, batch in enumerate(batches):
            number, first, log = step * len(batches) + i, i == 0, MetricSums()
            measured = self._gradient_shares(self._jobs(batch, number, MetricSums())) if shares and first else {}
            jobs = self._jobs(batch, number, log)
            norm, rate, applied = self.engine.update(jobs, number, between=between if first else nothing)
            done = {"grad_norm": norm, "learning_rate": rate, "skipped": float(bool(jobs) and not applied)}
            for key, value in (log.over_ranks() | measured | done).items():
                if first or not key.startswith("mismatch/"):  # later on the policy is meant to differ
                    found.setdefault(key, []).append(value)
        whole = ("mismatch/", "skipped", "gradient/")
        # A mean is over the mini-batches that have it: one may be left without a group.
        return {k: sum(v) if k.startswith(whole) else sum(v) / len(v) for k, v in found.items()}

    def _jobs(self, batch: UpdateInput, number: int, log: MetricSums) -> list[Job]:
        """One job a packed row of optimizer step `number`. Token weights hold the denominators of all ranks."""
        weights, tokens, counts = batch.weights, self.engine.passes.tokens, distributed.sum_metrics(counts_of(batch))
        jobs: list[Job] = []
        if batch.experience is not None and max(weights.policy, weights.kl, weights.single_step) > 0:
            for i, row in enumerate(rows_in_step(batch.experience.rollout.groups(), tokens)):
                seed = self._config.seed * 1_000_003 + number * 1_009 + i
                jobs.append(partial(self._policy_terms, batch, counts, row, seed, log))
        for name, groups, coef in (("pt", batch.text, weights.pt), ("bc", batch.cloning, weights.bc)):
            if counts[name] > 0 and coef > 0:
                rows = rows_in_step(groups, tokens)
                jobs += [partial(self._language_model_term, row, name, counts[name], coef, log) for row in rows]
        return jobs

    def _gradient_shares(self, jobs: Sequence[Job]) -> dict[str, float]:
        """Norm of each weighted term's gradient by itself, and its share of their sum. Collective; not under ZeRO 3."""
        norms = self.engine.gradient_norms(jobs, TERMS)
        total = max(sum(norms.values()), 1e-30)
        shares = {f"gradient/{name}_share": norm / total for name, norm in norms.items()}
        return {**{f"gradient/{name}": norm for name, norm in norms.items()}, **shares}

    def _distribution_terms(
        self, scored: Scored, row: PackedRow, weights: LossWeights, seed: int
    ) -> dict[str, TokenTerm]:
        """What the forward pass has to say of whole distributions."""
        terms: dict[str, TokenTerm] = {}
        teacher, of_row = scored.teacher, partial(self.engine.of_row, row)
        if weights.single_step > 0 and teacher.top_ids_SK is not None and teacher.top_logprobs_SK is not None:
            terms["single_step"] = tail_kl_term(of_row(teacher.top_ids_SK), of_row(teacher.top_logprobs_SK))
        elif weights.single_step > 0 and teacher.hidden_SD is not None:
            divergence = RECIPES[self._config.recipe].divergence
            terms["single_step"] = divergence(self._teacher(teacher.hidden_SD, row), self._config, seed)
        if weights.kl > 0 and scored.reference is not None:
            reference = scored.reference
            terms["kl"] = reverse_kl_term(WholeDistribution(of_row(reference.hidden_SD), reference.head))
        return terms

    def _policy_terms(
        self, batch: UpdateInput, counts: dict[str, float], row: PackedRow, seed: int, log: MetricSums
    ) -> dict[str, torch.Tensor]:
        """The weighted terms of one packed row of sampled responses. `counts`: of the batch over all ranks."""
        experience, weights = batch.experience, batch.weights
        assert experience is not None
        scored, rollout, config = experience.scored, experience.rollout, self._config.loss
        of_row = partial(self.engine.of_row, row)
        terms = self._distribution_terms(scored, row, weights, seed)
        out = self.engine(row, temperature=self._config.sampling.temperature, terms=terms)
        logprobs_S = out.logprobs_S
        if weights.policy == 0 and (weights.kl == 0 or "kl" in terms):
            logprobs_S = logprobs_S.detach()  # for the log only: no backward pass through them
        behavior_S = of_row(rollout.behavior_logprobs_S)
        importance_S = torch.ones_like(behavior_S) if scored.importance_S is None else of_row(scored.importance_S)
        sizes = {"tokens": counts["tokens"], "responses": counts["responses"]}
        longest = float(self._config.sampling.max_new_tokens)
        weights_S = token_weights(rollout.lengths_B, config.aggregation, **sizes, constant=longest)
        tokens = PolicyTokens(
            policy_logprobs_S=logprobs_S,
            old_logprobs_S=behavior_S if scored.policy_logprobs_S is None else of_row(scored.policy_logprobs_S),
            advantages_S=of_row(experience.advantages_S),
            weights_S=of_row(weights_S) * importance_S,
            response_S=row.response_S.to(self.engine.device),
        )
        loss, clipped_S = policy_loss(tokens, config)
        parts = {"policy": loss}
        mean = 1.0 / max(counts["tokens"], 1.0)
        if scored.reference_logprobs_S is not None:
            reference_S = of_row(scored.reference_logprobs_S)
            log.add("kl/reference", (k3(logprobs_S.detach(), reference_S) * importance_S).sum() * mean)
            if weights.kl > 0 and "kl" not in terms:
                parts["kl"] = kl_loss(logprobs_S, reference_S, tokens.weights_S, estimator=config.kl_estimator)
        for name in terms:  # a mean over all tokens, whatever the aggregation of the policy term
            parts[name] = (out.terms[name] * importance_S).sum() * mean
        with torch.no_grad():
            gap_S = (logprobs_S - behavior_S).abs()
            log.add("entropy", out.entropy_S.sum() * mean)
            log.add("clip_share", clipped_S.sum() * mean)
            log.add("mismatch/mean", gap_S.sum() * mean)
            log.largest("mismatch/max", F.pad(gap_S, (0, 1)).max())  # 0 of a row without a response token
        weighted = {name: value * getattr(weights, name) for name, value in parts.items()}
        for name, value in parts.items():
            log.add(f"loss/{name}", value)
        log.add("loss/total", torch.stack([v.detach().double() for v in weighted.values()]).sum())
        return weighted

    def _language_model_term(
        self, row: PackedRow, name: str, count: float, coef: float, log: MetricSums
    ) -> dict[str, torch.Tensor]:
        """Weighted cross-entropy of the row's response tokens, of `count` in the batch: L_PT or L_BC."""
        loss = lpt_loss(self.engine(row).logprobs_S, count)
        log.add(f"loss/{name}", loss)
        log.add("loss/total", loss * coef)
        return {name: loss * coef}


@dataclass
class MetricSums:
    """Sums over the packed rows of one optimizer step, for the log; on the device until `over_ranks` waits for it."""

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    most: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, name: str, value: torch.Tensor) -> None:
        self.sums[name] = value.detach().double() + self.sums.get(name, 0.0)

    def largest(self, name: str, value: torch.Tensor) -> None:
        value = value.detach().double()
        self.most[name] = torch.maximum(self.most.get(name, value), value)

    def over_ranks(self) -> dict[str, float]:
        """All of them over all ranks, in one transfer. Collective."""
        stacked = torch.stack([*self.sums.values(), *self.most.values()]).tolist() if self.sums else []
        numbers = dict(zip([*self.sums, *self.most], stacked, strict=True))
        most = {name: distributed.max_over_ranks(numbers.pop(name)) for name in self.most}
        return distributed.sum_metrics(numbers) | most


def end_list(generation: GenerationConfig) -> list[int]:
    """The end symbols of a generation config."""
    named = generation.eos_token_id
    return named if isinstance(named, list) else [] if named is None else [named]


def end_tokens(policy: Policy, asked: Format) -> tuple[int, ...]:
    """Every end symbol of the model's generation config, of its tokenizer and of its chat template."""
    return tuple(sorted({*end_list(policy.model.generation_config), asked.end, asked.end_of_text}))
