"""Responses that the teacher had a hand in: mixed token by token or response by response, or written by it whole.

MiniLLM samples from q = alpha p_T + (1 - alpha) pi (arXiv 2306.08543, section 2.2), so that a weak student visits
states worth learning from; the samples carry the importance weight of what was really drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from configs.schema import RunConfig
from training.actor import Actor
from training.experience import Prompt, Rollout, TeacherView
from training.losses import mixture_importance
from training.sampling import prompt_generator
from training.teaching import TeacherLink


def check_mixing(config: RunConfig, same_tokenizer: bool) -> None:
    """Raises ValueError where the teacher cannot be mixed in as asked."""
    if config.sampling.teacher_mix > 0 and config.sampling.mix_by == "token" and not same_tokenizer:
        raise ValueError(
            f"sampling.teacher_mix = {config.sampling.teacher_mix}: token by token it needs one tokenizer, and student "
            "and teacher have different ones; set sampling.mix_by to response"
        )


class TokenMixture:
    """At each token, alpha p_T + (1 - alpha) pi; the teacher decodes beside the student (equal tokenizers)."""

    def __init__(
        self, link: TeacherLink, prompts: Sequence[Prompt], alpha: float, group_size: int, max_new_tokens: int
    ) -> None:
        self._link = link
        self._alpha = alpha
        self._decoding = link.decode([link.prompt_tokens(p) for p in prompts], group_size, max_new_tokens)

    def __call__(self, t: int, active_A: torch.Tensor, last_A: torch.Tensor, policy_AV: torch.Tensor) -> torch.Tensor:
        """See `sampling.Mixture`; nats, float32 [A, V]."""
        future = self._decoding.first if t == 0 else self._decoding.next(active_A.tolist(), last_A.tolist())
        teacher_AV = self._link.whole_distribution(future.result()).to(policy_AV.device)
        out = policy_AV + math.log(1.0 - self._alpha)
        shared = min(out.shape[-1], teacher_AV.shape[-1])
        out[:, :shared] = torch.logaddexp(out[:, :shared], teacher_AV[:, :shared] + math.log(self._alpha))
        return out

    def close(self) -> None:
        """Give the server's memory back."""
        self._decoding.close()


def mix_responses(actor: Actor, link: TeacherLink, rollout: Rollout, config: RunConfig, step: int) -> Rollout:
    """Each response is the teacher's with probability alpha, drawn by the prompt's own seed. Collective under ZeRO 3.

    `behavior_logprobs_BR` is the student's opinion of every response, also of those that it did not write.
    """
    alpha, group = config.sampling.teacher_mix, rollout.group_size
    chosen = [
        n * group + g
        for n, prompt in enumerate(rollout.prompts)
        for g in torch.nonzero(
            torch.rand(group, generator=prompt_generator(config.seed + 1, step, prompt.index)) < alpha
        ).flatten().tolist()
    ]  # fmt: skip
    responses, finished = list(rollout.responses), rollout.finished_B.clone()
    if chosen:
        asked = [rollout.prompts[b // group] for b in chosen]
        written = link.responses(
            asked, config.sampling.max_new_tokens, actor, temperature=1.0, seed=config.seed * 1_000_003 + step
        )
        for b, (tokens, ended) in zip(chosen, written, strict=True):
            responses[b], finished[b] = tokens, ended
    return rescored(actor, replace(rollout, responses=responses, finished_B=finished))


def teacher_rollout(
    actor: Actor, link: TeacherLink, prompts: Sequence[Prompt], config: RunConfig, step: int
) -> Rollout:
    """One answer of the teacher to each prompt, as a rollout with G = 1. Collective under ZeRO 3."""
    written = link.responses(
        prompts, config.sampling.max_new_tokens, actor, temperature=config.distill.answer_temperature,
        seed=config.seed * 1_000_003 + step,
    )  # fmt: skip
    responses = [tokens for tokens, _ in written]
    nothing = torch.zeros(len(responses), 0)
    rollout = Rollout(
        prompts=list(prompts), group_size=1, responses=responses,
        finished_B=torch.tensor([ended for _, ended in written], dtype=torch.bool),
        behavior_logprobs_BR=nothing, sampled_logprobs_BR=nothing, texts=actor.texts(responses),
    )  # fmt: skip
    return rescored(actor, rollout)


def rescored(actor: Actor, rollout: Rollout) -> Rollout:
    """The rollout with the student's log-probabilities of whatever its responses are now."""
    longest = max((len(r) for r in rollout.responses), default=0)
    blank = torch.zeros(len(rollout.responses), longest)
    rollout = replace(rollout, behavior_logprobs_BR=blank, sampled_logprobs_BR=blank)
    logprobs_BR = actor.logprobs(rollout)
    return replace(
        rollout, behavior_logprobs_BR=logprobs_BR, sampled_logprobs_BR=logprobs_BR, texts=actor.texts(rollout.responses)
    )


def importance_of(rollout: Rollout, view: TeacherView, config: RunConfig) -> torch.Tensor | None:
    """Weights pi_b / q of a mixed rollout, float32 [B, R], or None where the student alone was sampled.

    Response by response, q(y) = alpha p_T(y) + (1 - alpha) pi(y): the weight is the same for all tokens of y and at
    most 1 / (1 - alpha).
    """
    alpha = config.sampling.teacher_mix
    if alpha == 0:
        return None
    behavior_BR, lengths_B = rollout.behavior_logprobs_BR, rollout.lengths_B
    if config.sampling.mix_by == "token":
        return mixture_importance(behavior_BR, rollout.sampled_logprobs_BR, lengths_B, by=config.sampling.mix_weight)
    gap_B = view.logprobs_BR.sum(1) - behavior_BR.sum(1)
    log_q_B = torch.logaddexp(gap_B + math.log(alpha), torch.full_like(gap_B, math.log(1.0 - alpha)))
    return torch.where(rollout.mask_BR, torch.exp(-log_q_B)[:, None], 0.0)
