"""The actor: the student under DeepSpeed's hybrid engine. It samples and it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig

from configs.schema import RunConfig, SamplingConfig
from inference.packing import PackedRow, pack, scatter_responses
from rewards.lpt_reward import lpt_loss
from training import distributed
from training.adapters import adapter_off, plain_parameters, save_plain
from training.composite import TERMS, LossWeights, UpdateInput, counts_of
from training.data import random_stream
from training.deepspeed_engine import Engine, RolloutEngine, in_step, replace_directory
from training.distillation import ReverseKL, TailReverseKL, WholeDistribution
from training.experience import Experience, Prompt, Rollout, batch_order
from training.losses import kl_loss, policy_loss, token_weights
from training.memory import TokenBudget, agreed
from training.policy import Policy, TokenTerm, load_policy
from training.rollout import DeepSpeedRollout, responses_of
from training.safe_points import nothing
from training.sampling import Mixture, prompt_generator, sample
from training.sums import Sums

Divergence = Callable[[WholeDistribution, RunConfig, int], TokenTerm]
"""From the teacher's distribution at a row's response tokens to the term that compares the student with it."""


class Actor:
    """Samples from the student, trains it, saves it. Methods marked collective are called by all ranks together."""

    def __init__(
        self, config: RunConfig, path: str | Path, *, total_steps: int, learning_rate: float,
        teacher_output_VD: torch.Tensor | None = None, divergence: Divergence = lambda teacher, *_: ReverseKL(teacher),
    ) -> None:  # fmt: skip
        self._config = config
        self._divergence = divergence
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        policy = load_policy(
            path, config.student.dtype, gradient_checkpointing=config.student.gradient_checkpointing,
            adapter=config.student.adapter,
        )  # fmt: skip
        self.budget = TokenBudget(config.actor.micro_batch_tokens)
        self.end_tokens = end_tokens(policy, self.tokenizer)
        pad = self.tokenizer.pad_token_id  # 0 is a pad id like any other (trap 17)
        self.pad_token = self.end_tokens[0] if pad is None else int(pad)
        if config.actor.zero_stage == 3:
            policy.agree = lambda chunks: int(distributed.max_over_ranks(chunks))
        self.engine = Engine(
            policy, config.actor, peak_learning_rate=learning_rate, zero_stage=config.actor.zero_stage,
            dtype=config.student.dtype, hybrid=config.actor.hybrid_engine, total_steps=total_steps,
            injected_tokens=0 if config.actor.rollout == "grouped" else room_for_sequences(config),
        )  # fmt: skip
        self.engine.module.eval()
        self.rollout: RolloutEngine | None = None
        """Another engine that samples, in place of ours."""
        if config.actor.rollout == "deepspeed":
            self.rollout = DeepSpeedRollout(self.engine, self.end_tokens, self.pad_token)
        self.teacher_output_VD = None if teacher_output_VD is None else teacher_output_VD.to(self.engine.device)
        """[V, D] the teacher's output layer, on the student's device."""

    @property
    def policy(self) -> Policy:
        """The student as a module."""
        module = self.engine.module
        assert isinstance(module, Policy)
        return module

    def sample(
        self, prompts: Sequence[Prompt], *, step: int, sampling: SamplingConfig | None = None, greedy: bool = False,
        on_step: Callable[[int], None] | None = None, mixture: Mixture | None = None,
    ) -> Rollout:  # fmt: skip
        """Answer this rank's prompts; seeds are (config.seed, step, prompt index). Collective under ZeRO 3."""
        sampling = sampling or self._config.sampling
        if self.rollout is not None and mixture is None:
            return self._sample_elsewhere(self.rollout, prompts, sampling, step, greedy)
        generators = None if greedy else [prompt_generator(self._config.seed, step, p.index) for p in prompts]
        samples = sample(
            self.policy, [p.tokens for p in prompts], sampling, end_tokens=self.end_tokens, generators=generators,
            any_rank=distributed.any_rank if self.engine.zero_stage == 3 else None,
            on_step=on_step or (lambda _: distributed.beat()),
            mixture=mixture,
        )  # fmt: skip
        return Rollout(
            prompts=list(prompts),
            group_size=sampling.group_size,
            responses=samples.responses,
            finished_B=samples.finished_B,
            behavior_logprobs_BR=samples.full_logprobs_BR,
            sampled_logprobs_BR=samples.drawn_logprobs_BR,
            texts=self.texts(samples.responses),
        )

    def _sample_elsewhere(
        self, engine: RolloutEngine, prompts: Sequence[Prompt], sampling: SamplingConfig, step: int, greedy: bool
    ) -> Rollout:
        """Another engine's samples. It says no log-probabilities, so the training forward's stand for them."""
        # Engines draw from torch's own stream; it belongs to (seed, step, rank) here, and is put back.
        with torch.random.fork_rng(devices=[self.engine.device] if self.engine.device.type == "cuda" else []):
            torch.manual_seed(random_stream(self._config.seed, step, distributed.rank()).initial_seed())
            responses = responses_of(
                engine, [p.tokens for p in prompts], sampling, end_tokens=self.end_tokens, greedy=greedy,
                pad_token=self.pad_token, device=self.engine.device,
            )  # fmt: skip
        blank = torch.zeros(len(responses), max((len(r) for r in responses), default=0))
        finished_B = torch.tensor([bool(r) and r[-1] in self.end_tokens for r in responses], dtype=torch.bool)
        rollout = Rollout(
            list(prompts), sampling.group_size, responses, finished_B, blank, blank, self.texts(responses)
        )
        logprobs_BR = self.logprobs(rollout)
        return replace(rollout, behavior_logprobs_BR=logprobs_BR, sampled_logprobs_BR=logprobs_BR)

    def texts(self, responses: Sequence[tuple[int, ...]]) -> list[str]:
        """Response texts, special symbols removed, stripped."""
        return [
            text.strip() for text in self.tokenizer.batch_decode([list(r) for r in responses], skip_special_tokens=True)
        ]

    @torch.no_grad()
    def teacher_kl(self, rollout: Rollout, teacher_hidden_SD: torch.Tensor) -> torch.Tensor:
        """Exact KL(student || teacher) at each response token's state, nats, float32 [B, R]. Temperature 1."""
        index_BR = batch_order(rollout.lengths_B, rollout.behavior_logprobs_BR.shape[1])

        def one(row: PackedRow) -> torch.Tensor:
            term = ReverseKL(self._teacher(teacher_hidden_SD, index_BR[row.response_S, row.offset_S]))
            return self.policy(row.to(self.engine.device), terms={"teacher": term}).terms["teacher"]

        return self._each_token(rollout, one)

    @torch.no_grad()
    def logprobs(self, rollout: Rollout, *, start_of_run: bool = False) -> torch.Tensor:
        """log pi of the response tokens by the training forward, at the sampling temperature, float32 [B, R].

        `start_of_run`: with the adapter switched off. Collective under ZeRO 3.
        """
        temperature = self._config.sampling.temperature

        def one(row: PackedRow) -> torch.Tensor:
            return self.policy(row.to(self.engine.device), temperature=temperature).logprobs_S

        with adapter_off(self.policy.model) if start_of_run else nullcontext():
            return self._each_token(rollout, one)

    @torch.no_grad()
    def entropies(self, rollout: Rollout) -> torch.Tensor:
        """Entropy of the student at each response token's state, nats, float32 [B, R]. Collective under ZeRO 3."""
        temperature = self._config.sampling.temperature
        return self._each_token(
            rollout, lambda row: self.policy(row.to(self.engine.device), temperature=temperature).entropy_S
        )

    def _each_token(self, rollout: Rollout, one: Callable[[PackedRow], torch.Tensor]) -> torch.Tensor:
        """A number for each response token, row by row, in step with the other ranks, float32 [B, R]."""

        def passes(tokens: int) -> torch.Tensor:
            rows = in_step(pack(rollout.groups(), tokens))
            values = agreed(lambda: [one(row).cpu() for row, _ in rows], exchanging=self.engine.zero_stage == 3)
            real = [row for row, used in rows if used]
            return scatter_responses(real, values[: len(real)], *rollout.behavior_logprobs_BR.shape)

        return self.budget.spend(passes)

    def _teacher(self, hidden_SD: torch.Tensor, index_S: torch.Tensor) -> WholeDistribution:
        """The teacher's distribution at the response tokens `index_S` of the batch."""
        assert self.teacher_output_VD is not None
        return WholeDistribution(hidden_SD[index_S].to(self.engine.device), self.teacher_output_VD)

    def update(
        self, batches: Sequence[UpdateInput], step: int, *, rate_factor: float = 1.0, shares: bool = False,
        between: Callable[[], None] = nothing,
    ) -> dict[str, float]:  # fmt: skip
        """One optimizer step for each mini-batch. Metrics are over all ranks. Collective.

        `rate_factor` scales the learning rate. `shares`: measure each term's gradient on the first mini-batch as well.
        `between` is called before each pass of the first mini-batch, and may raise: nothing has changed then.
        """
        merged: dict[str, float] = {}
        for i, batch in enumerate(batches):
            number = step * len(batches) + i
            first = i == 0
            metrics = self._optimizer_step(batch, number, rate_factor, shares and first, between if first else nothing)
            for key, value in metrics.items():
                if key.startswith("mismatch/") and i > 0:
                    continue  # after the first optimizer step the policy is meant to differ
                merged[key] = merged.get(key, 0.0) + value
        whole = ("mismatch/", "skipped", "gradient/")
        return {k: v if k.startswith(whole) else v / len(batches) for k, v in merged.items()}

    def _optimizer_step(
        self, batch: UpdateInput, step: int, rate_factor: float, shares: bool, between: Callable[[], None]
    ) -> dict[str, float]:
        counts = distributed.sum_metrics(counts_of(batch))

        def take(tokens: int) -> tuple[Sums, dict[str, float], tuple[float, float, bool]]:
            sums = Sums({})
            measured = self._gradient_shares(batch, counts, step, tokens) if shares else {}
            jobs = self._jobs(batch, counts, sums, step, tokens)
            return sums, measured, self.engine.update(jobs, step, rate_factor=rate_factor, between=between)

        sums, measured, (norm, rate, applied) = self.budget.spend(take)
        numbers = sums.numbers()
        biggest = numbers.pop("mismatch/max", 0.0)
        metrics = distributed.sum_metrics(numbers)
        if "mismatch/mean" in metrics:
            metrics["mismatch/max"] = distributed.max_over_ranks(biggest)
        return {**metrics, **measured, "grad_norm": norm, "learning_rate": rate, "skipped": float(not applied)}

    def _jobs(
        self, batch: UpdateInput, counts: dict[str, float], sums: Sums, step: int, tokens: int
    ) -> list[Callable[[], dict[str, torch.Tensor]]]:
        """One job a packed row of at most `tokens`: a forward pass that returns the row's weighted terms by name."""
        jobs: list[Callable[[], dict[str, torch.Tensor]]] = []
        weights = batch.weights
        if batch.experience is not None and max(weights.policy, weights.kl, weights.single_step) > 0:
            jobs += self._policy_jobs(batch.experience, weights, counts, sums, step, tokens)
        for name, groups, coef in (("pt", batch.text, weights.pt), ("bc", batch.cloning, weights.bc)):
            if counts[name] > 0 and coef > 0:
                jobs += [
                    partial(self._language_model_loss, row, used * coef, counts[name], name, sums, used)
                    for row, used in in_step(pack(groups, tokens))
                ]
        return jobs

    def _gradient_shares(
        self, batch: UpdateInput, counts: dict[str, float], step: int, tokens: int
    ) -> dict[str, float]:
        """Norm of each weighted term's gradient by itself, and its share of their sum. Collective; not under ZeRO 3."""
        norms = self.engine.gradient_norms(lambda: self._jobs(batch, counts, Sums({}), step, tokens), list(TERMS))
        total = max(sum(norms.values()), 1e-30)
        shares = {f"gradient/{name}_share": norm / total for name, norm in norms.items()}
        return {**{f"gradient/{name}": norm for name, norm in norms.items()}, **shares}

    def _policy_jobs(
        self, experience: Experience, weights: LossWeights, counts: dict[str, float], sums: Sums, step: int,
        tokens: int,
    ) -> list[Callable[[], dict[str, torch.Tensor]]]:  # fmt: skip
        """One job a packed row: forward, and every term that is a sum over response tokens."""
        rollout = experience.rollout
        longest = rollout.behavior_logprobs_BR.shape[1]
        weights_BR = token_weights(
            rollout.lengths_B, longest, aggregation=self._config.loss.aggregation, tokens=counts["tokens"],
            responses=counts["responses"], constant=float(self._config.sampling.max_new_tokens),
        )  # fmt: skip
        index_BR = batch_order(rollout.lengths_B, longest)
        rows = in_step(pack(rollout.groups(), tokens))
        seed = self._config.seed * 1_000_003 + step * 1_009
        return [
            partial(self._policy_loss, experience, row, used, weights_BR, index_BR, weights, counts, sums, seed + i)
            for i, (row, used) in enumerate(rows)
        ]

    def _terms(
        self, experience: Experience, index_S: torch.Tensor, weights: LossWeights, seed: int
    ) -> dict[str, TokenTerm]:
        """What the forward pass has to say of whole distributions."""
        terms: dict[str, TokenTerm] = {}
        if weights.single_step > 0 and experience.teacher_entries is not None:
            some = experience.teacher_entries.select(index_S)
            terms["single_step"] = TailReverseKL(
                some.ids_SK.to(self.engine.device), some.logprobs_SK.to(self.engine.device)
            )
        elif weights.single_step > 0 and experience.teacher_hidden_SD is not None:
            terms["single_step"] = self._divergence(
                self._teacher(experience.teacher_hidden_SD, index_S), self._config, seed
            )
        if weights.kl > 0 and experience.reference_states is not None:
            states = experience.reference_states
            hidden = states.hidden_SD[index_S].to(self.engine.device)
            terms["kl"] = ReverseKL(WholeDistribution(hidden, states.output_VD.to(self.engine.device)))
        return terms

    def _policy_loss(
        self, experience: Experience, row: PackedRow, used: float, weights_BR: torch.Tensor, index_BR: torch.Tensor,
        weights: LossWeights, counts: dict[str, float], sums: Sums, seed: int,
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        """The weighted terms of one packed row; token weights hold the global denominators."""
        config, device = self._config.loss, self.engine.device
        at = (row.response_S, row.offset_S)
        terms = self._terms(experience, index_BR[at], weights, seed)
        out = self.engine.engine(row.to(device), temperature=self._config.sampling.temperature, terms=terms)
        token_S = weights_BR[at].to(device) * used
        importance_S = None if experience.importance_BR is None else experience.importance_BR[at].to(device)
        old_BR = experience.old_logprobs_BR
        behavior_S = experience.rollout.behavior_logprobs_BR[at].to(device)
        old_S = behavior_S if old_BR is None else old_BR[at].to(device)
        loss, clipped_S = policy_loss(
            out.logprobs_S, old_S, experience.advantages_BR[at].to(device), token_S, row.response_S.to(device),
            clip_low=config.clip_low, clip_high=config.clip_high, ratio=config.ratio, importance_S=importance_S,
        )  # fmt: skip
        parts = {"policy": loss}
        if importance_S is not None:
            token_S = token_S * importance_S
        mean = used / max(counts["tokens"], 1.0)
        if experience.reference_logprobs_BR is not None:
            reference_S = experience.reference_logprobs_BR[at].to(device)
            with torch.no_grad():
                k3 = torch.exp(reference_S - out.logprobs_S) - 1 + out.logprobs_S - reference_S
                k3 = k3 if importance_S is None else k3 * importance_S
                sums.add("kl/reference", k3.sum() * mean)
            if weights.kl > 0 and "kl" not in terms:
                parts["kl"] = kl_loss(out.logprobs_S, reference_S, token_S, estimator=config.kl_estimator)
        for name in terms:  # a mean over all tokens, whatever the aggregation of the policy term
            value_S = out.terms[name] if importance_S is None else out.terms[name] * importance_S
            parts[name] = value_S.sum() * mean
        with torch.no_grad():
            gap_S = (out.logprobs_S - behavior_S).abs()
            sums.add("entropy", out.entropy_S.sum() * mean)
            sums.add("clip_share", clipped_S.sum() * mean)
            sums.add("mismatch/mean", gap_S.sum() * mean)
            if used and len(gap_S):
                sums.largest("mismatch/max", gap_S.max())
        return self._weighted(parts, weights, sums)

    def _weighted(self, parts: dict[str, torch.Tensor], weights: LossWeights, sums: Sums) -> dict[str, torch.Tensor]:
        """Each term times its weight; logs both."""
        weighted = {name: value * getattr(weights, name) for name, value in parts.items()}
        for name, value in parts.items():
            sums.add(f"loss/{name}", value.detach())
        sums.add("loss/total", torch.stack([v.detach().double() for v in weighted.values()]).sum())
        return weighted

    def _language_model_loss(
        self, row: PackedRow, weight: float, tokens: float, name: str, sums: Sums, used: float
    ) -> dict[str, torch.Tensor]:
        """Weighted cross-entropy of the row's response tokens: L_PT or L_BC."""
        out = self.engine.engine(row.to(self.engine.device))
        loss = lpt_loss(out.logprobs_S, tokens)
        sums.add(f"loss/{name}", loss.detach() * used)
        sums.add("loss/total", loss.detach() * weight)
        return {name: loss * weight}

    def plain_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and value of every parameter as Hugging Face has it, adapters merged. Collective under ZeRO 3."""
        return plain_parameters(self.policy.model, self.engine.gathered)

    def export(self, directory: Path) -> None:
        """Write the student as a Hugging Face model directory, replacing it in one move. Collective under ZeRO 3."""
        state = {}
        for name, value in self.plain_parameters():
            if distributed.is_main():
                state[name] = value.cpu().clone()
        if distributed.is_main():
            replace_directory(directory, partial(self._write_export, state))
        distributed.barrier()

    @torch.no_grad()
    def interpolate(self, start: str | Path, rate: float) -> None:
        """Move the weights to start + rate * (now - start) (WARP, arXiv 2406.16768, eq. 5). Collective.

        For the end of a run: the optimizer's own copies are not moved.
        """
        origin = dict(load_policy(start, self._config.student.dtype).model.named_parameters())
        for name, parameter in self.policy.model.named_parameters():
            with self.engine.gathered([parameter], write=True):
                if name in origin:
                    parameter.lerp_(origin[name].to(parameter), 1.0 - rate)
                elif "lora_B" in name:
                    parameter.mul_(rate)  # the adapter started at zero

    def _write_export(self, state: dict[str, torch.Tensor], directory: Path) -> None:
        model = self.policy.model
        implementation = model.config._attn_implementation
        # The exported directory must load without our attention function.
        model.config._attn_implementation = None
        quantization = model.config.__dict__.pop("quantization_config", None)
        save_plain(model, state, directory)
        if quantization is not None:
            model.config.quantization_config = quantization
        model.config._attn_implementation = implementation
        self.tokenizer.save_pretrained(directory)


def room_for_sequences(config: RunConfig) -> int:
    """Longest prompt plus response, in tokens."""
    return config.data.max_prompt_tokens + config.sampling.max_new_tokens


def end_tokens(policy: Policy, tokenizer: object) -> tuple[int, ...]:
    """Every end symbol of the model's generation config and of its tokenizer."""
    found: set[int] = set()
    generation: GenerationConfig | None = getattr(policy.model, "generation_config", None)
    for value in (getattr(generation, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)):
        if value is not None:
            found.update(value if isinstance(value, list) else [value])
    if not found:
        raise ValueError("student.path: the model names no end-of-sequence token; set eos_token_id in its config")
    return tuple(sorted(found))
