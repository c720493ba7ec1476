"""The actor: the student under DeepSpeed's hybrid engine. It samples and it trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig

from configs.schema import RunConfig, SamplingConfig
from inference.packing import Group, PackedRow, pack, scatter_responses
from rewards.lpt_reward import lpt_loss
from training import distributed
from training.deepspeed_engine import Engine, in_step, replace_directory
from training.distillation import ReverseKL, WholeDistribution
from training.experience import Experience, Prompt, Rollout
from training.losses import kl_loss, policy_loss, token_weights
from training.policy import Policy, TokenTerm, load_policy
from training.sampling import prompt_generator, sample


@dataclass(frozen=True)
class UpdateInput:
    """One mini-batch of this rank for one optimizer step."""

    experience: Experience | None
    """Sampled responses with their advantages; None: supervised text only (stage 1)."""
    text: Sequence[Group]
    """L_PT: raw text, the first token as the prompt and the rest as its response."""
    cloning: Sequence[Group]
    """L_BC: prompts with the answers to imitate."""
    single_step_coef: float
    """lambda_1 in force."""


@dataclass
class _Sums:
    """Local sums over the rows of one optimizer step, for the log."""

    values: dict[str, float]

    def add(self, name: str, value: torch.Tensor | float) -> None:
        self.values[name] = self.values.get(name, 0.0) + float(value)


class Actor:
    """Samples from the student, trains it, saves it. Methods marked collective are called by all ranks together."""

    def __init__(
        self, config: RunConfig, path: str | Path, *, total_steps: int, learning_rate: float,
        teacher_output_VD: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        self._config = config
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        policy = load_policy(path, config.student.dtype, gradient_checkpointing=config.student.gradient_checkpointing)
        self.end_tokens = end_tokens(policy, self.tokenizer)
        if config.actor.zero_stage == 3:
            policy.agree = lambda chunks: int(distributed.max_over_ranks(chunks))
        self.engine = Engine(
            policy, config.actor, peak_learning_rate=learning_rate, zero_stage=config.actor.zero_stage,
            dtype=config.student.dtype, hybrid=config.actor.hybrid_engine, total_steps=total_steps,
        )  # fmt: skip
        self.engine.module.eval()
        self._teacher_output_VD = None if teacher_output_VD is None else teacher_output_VD.to(self.engine.device)

    @property
    def policy(self) -> Policy:
        """The student as a module."""
        module = self.engine.module
        assert isinstance(module, Policy)
        return module

    def sample(
        self, prompts: Sequence[Prompt], *, step: int, sampling: SamplingConfig | None = None, greedy: bool = False,
        on_step: Callable[[int], None] | None = None,
    ) -> Rollout:  # fmt: skip
        """Answer this rank's prompts; seeds are (config.seed, step, prompt index). Collective under ZeRO 3."""
        sampling = sampling or self._config.sampling
        generators = None if greedy else [prompt_generator(self._config.seed, step, p.index) for p in prompts]
        samples = sample(
            self.policy, [p.tokens for p in prompts], sampling, end_tokens=self.end_tokens, generators=generators,
            any_rank=distributed.any_rank if self.engine.zero_stage == 3 else None, on_step=on_step,
        )  # fmt: skip
        texts = self.tokenizer.batch_decode([list(r) for r in samples.responses], skip_special_tokens=True)
        return Rollout(
            prompts=list(prompts),
            group_size=sampling.group_size,
            responses=samples.responses,
            finished_B=samples.finished_B,
            behavior_logprobs_BR=samples.full_logprobs_BR,
            sampled_logprobs_BR=samples.drawn_logprobs_BR,
            texts=[t.strip() for t in texts],
        )

    @torch.no_grad()
    def teacher_kl(self, rollout: Rollout, teacher_hidden_SD: torch.Tensor) -> torch.Tensor:
        """Exact KL(student || teacher) at each response token's state, nats, float32 [B, R]. Temperature 1."""
        rows = pack(rollout.groups(), self._config.actor.micro_batch_tokens)
        index_BR = batch_order(rollout.lengths_B, rollout.behavior_logprobs_BR.shape[1])
        outputs = []
        for row, _ in in_step(rows):
            term = self._teacher_term(teacher_hidden_SD, index_BR[row.response_S, row.offset_S])
            out = self.policy(row.to(self.engine.device), terms={"teacher": term})
            outputs.append(out.terms["teacher"].cpu())
        return scatter_responses(rows, outputs[: len(rows)], *rollout.behavior_logprobs_BR.shape)

    def _teacher_term(self, hidden_SD: torch.Tensor, index_S: torch.Tensor) -> TokenTerm:
        """KL(student || teacher) at the response tokens `index_S` of the batch."""
        assert self._teacher_output_VD is not None
        return ReverseKL(WholeDistribution(hidden_SD[index_S].to(self.engine.device), self._teacher_output_VD))

    def update(self, batches: Sequence[UpdateInput], step: int) -> dict[str, float]:
        """One optimizer step for each mini-batch. Metrics are over all ranks. Collective."""
        merged: dict[str, float] = {}
        for i, batch in enumerate(batches):
            for key, value in self._optimizer_step(batch, step * len(batches) + i).items():
                if key.startswith("mismatch/") and i > 0:
                    continue  # after the first optimizer step the policy is meant to differ
                merged[key] = merged.get(key, 0.0) + value
        shared = {"mismatch/mean", "mismatch/max", "skipped"}
        return {k: v if k in shared else v / len(batches) for k, v in merged.items()}

    def _optimizer_step(self, batch: UpdateInput, step: int) -> dict[str, float]:
        sums = _Sums({})
        counts = distributed.sum_metrics(_counts(batch))
        budget = self._config.actor.micro_batch_tokens
        jobs: list[Callable[[], torch.Tensor]] = []
        if batch.experience is not None:
            jobs += self._policy_jobs(batch.experience, batch.single_step_coef, counts, sums)
        for name, groups, coef in (
            ("pt", batch.text, self._config.pt_coef),
            ("bc", batch.cloning, self._config.loss.bc_coef if batch.experience is not None else 1.0),
        ):
            if counts[name] > 0:
                jobs += [
                    partial(self._language_model_loss, row, used * coef, counts[name], f"loss/{name}", sums, used)
                    for row, used in in_step(pack(groups, budget))
                ]
        norm, rate, applied = self.engine.update(jobs, step)
        biggest = sums.values.pop("mismatch/max", 0.0)
        metrics = distributed.sum_metrics(sums.values)
        if batch.experience is not None:
            metrics["mismatch/max"] = distributed.max_over_ranks(biggest)
        return {**metrics, "grad_norm": norm, "learning_rate": rate, "skipped": float(not applied)}

    def _policy_jobs(
        self, experience: Experience, single_step_coef: float, counts: dict[str, float], sums: _Sums
    ) -> list[Callable[[], torch.Tensor]]:
        """One job a packed row: forward, and every term that is a sum over response tokens."""
        rollout = experience.rollout
        longest = rollout.behavior_logprobs_BR.shape[1]
        loss = self._config.loss
        weights_BR = token_weights(
            rollout.lengths_B, longest, aggregation=loss.aggregation, tokens=counts["tokens"],
            responses=counts["responses"], constant=float(self._config.sampling.max_new_tokens),
        )  # fmt: skip
        index_BR = batch_order(rollout.lengths_B, longest)
        rows = in_step(pack(rollout.groups(), self._config.actor.micro_batch_tokens))
        return [
            partial(self._policy_loss, experience, row, used, weights_BR, index_BR, single_step_coef, counts, sums)
            for row, used in rows
        ]

    def _policy_loss(
        self, experience: Experience, row: PackedRow, used: float, weights_BR: torch.Tensor,
        index_BR: torch.Tensor, single_step_coef: float, counts: dict[str, float], sums: _Sums,
    ) -> torch.Tensor:  # fmt: skip
        """L_policy + beta L_KL + lambda_1 L_single of one packed row; weights hold the global denominators."""
        config, device = self._config.loss, self.engine.device
        at = (row.response_S, row.offset_S)
        hidden = experience.teacher_hidden_SD
        terms = {} if hidden is None else {"single_step": self._teacher_term(hidden, index_BR[at])}
        out = self.engine.engine(row.to(device), temperature=self._config.sampling.temperature, terms=terms)
        weights_S = weights_BR[at].to(device) * used
        behavior_S = experience.rollout.behavior_logprobs_BR[at].to(device)
        policy_term, clipped_S = policy_loss(
            out.logprobs_S, behavior_S, experience.advantages_BR[at].to(device), weights_S, row.response_S.to(device),
            clip_low=config.clip_low, clip_high=config.clip_high, ratio=config.ratio,
        )  # fmt: skip
        total = config.policy_coef * policy_term
        sums.add("loss/policy", policy_term.detach())
        mean = used / max(counts["tokens"], 1.0)
        if experience.reference_logprobs_BR is not None:
            reference_S = experience.reference_logprobs_BR[at].to(device)
            with torch.no_grad():
                k3 = torch.exp(reference_S - out.logprobs_S) - 1 + out.logprobs_S - reference_S
                sums.add("kl/reference", k3.sum() * mean)
            if config.kl_coef > 0:
                kl_term = kl_loss(out.logprobs_S, reference_S, weights_S, estimator=config.kl_estimator)
                total = total + config.kl_coef * kl_term
                sums.add("loss/kl", kl_term.detach())
        if "single_step" in out.terms:
            single = out.terms["single_step"].sum() * mean
            total = total + single_step_coef * single
            sums.add("loss/single_step", single.detach())
        with torch.no_grad():
            gap_S = (out.logprobs_S - behavior_S).abs()
            sums.add("entropy", out.entropy_S.sum() * mean)
            sums.add("clip_share", clipped_S.sum() * mean)
            sums.add("mismatch/mean", gap_S.sum() * mean)
            if used and len(gap_S):
                sums.values["mismatch/max"] = max(sums.values.get("mismatch/max", 0.0), float(gap_S.max()))
            sums.add("loss/total", total)
        return total

    def _language_model_loss(
        self, row: PackedRow, weight: float, tokens: float, name: str, sums: _Sums, used: float
    ) -> torch.Tensor:
        """Weighted cross-entropy of the row's response tokens: L_PT or L_BC."""
        out = self.engine.engine(row.to(self.engine.device))
        loss = lpt_loss(out.logprobs_S, tokens)
        sums.add(name, loss.detach() * used)
        sums.add("loss/total", loss.detach() * weight)
        return loss * weight

    def export(self, directory: Path) -> None:
        """Write the student as a Hugging Face model directory, replacing it in one move. Collective under ZeRO 3."""
        state = self.engine.full_state_dict()
        if state is not None:
            named = {name.removeprefix("model."): tensor for name, tensor in state.items()}
            replace_directory(directory, partial(self._write_export, named))
        distributed.barrier()

    def _write_export(self, state: dict[str, torch.Tensor], directory: Path) -> None:
        model = self.policy.model
        implementation = model.config._attn_implementation
        # The exported directory must load without our attention function.
        model.config._attn_implementation = None
        model.save_pretrained(directory, state_dict=state)
        model.config._attn_implementation = implementation
        self.tokenizer.save_pretrained(directory)


class Reference:
    """A frozen copy of a policy, held by each rank."""

    def __init__(self, config: RunConfig, path: str | Path, device: torch.device) -> None:
        self._config = config
        self._device = device
        self._policy = load_policy(path, config.student.dtype).to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def logprobs(self, rollout: Rollout) -> torch.Tensor:
        """log pi_ref of the response tokens at the sampling temperature, float32 [B, R]; 0 on padding."""
        rows = pack(rollout.groups(), self._config.actor.micro_batch_tokens)
        values = [
            self._policy(row.to(self._device), temperature=self._config.sampling.temperature).logprobs_S.cpu()
            for row in rows
        ]
        return scatter_responses(rows, values, *rollout.behavior_logprobs_BR.shape)


def batch_order(lengths_B: torch.Tensor, longest: int) -> torch.Tensor:
    """int64 [B, R]: place of token (b, t) among all response tokens in batch order (b, then t)."""
    starts = torch.cumsum(lengths_B, 0) - lengths_B
    return starts[:, None] + torch.arange(longest)[None, :]


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


def _counts(batch: UpdateInput) -> dict[str, float]:
    """This rank's denominators."""
    tokens = responses = 0.0
    if batch.experience is not None:
        lengths = batch.experience.rollout.lengths_B
        tokens, responses = float(lengths.sum()), float(len(lengths))
    return {
        "tokens": tokens,
        "responses": responses,
        "pt": float(sum(len(r) for g in batch.text for r in g.responses)),
        "bc": float(sum(len(r) for g in batch.cloning for r in g.responses)),
    }
