"""Responses that the teacher had a hand in: mixed token by token or response by response, or written by it whole.

MiniLLM samples from q = alpha p_T + (1 - alpha) pi (arXiv 2306.08543, section 2.2), so that a weak student visits
states worth learning from; the samples carry the importance weight of what was really drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from configs.checks import require
from configs.prompts import Format
from configs.schema import RunConfig, SamplingConfig
from rewards.minillm import mixed_logprobs, mixture_importance, response_mixture_importance
from training.data.order import random_stream
from training.experience import Prompt, Rollout, TeacherView
from training.run.launcher import environment_world_size
from training.student.actor import Actor
from training.teacher.link import TeacherLink


def check_cache(config: RunConfig, asked: Format, prompts: Sequence[Prompt]) -> None:
    """What the teacher holds while it is mixed in token by token fits into its cache, whichever prompts a step takes,
    for all ranks that ask one server at a time: of what does not, each token would be decoded from the start again.
    `asked`: how the teacher is asked. Raises ValueError."""
    sampling = config.sampling
    if sampling.teacher_mix == 0 or sampling.mix_by != "token":
        return
    world, replicas = environment_world_size(), (config.teacher.address or "").count(",") + 1
    mine, ranks = config.prompts_per_step // world, -(-world // replicas)
    count = min(sampling.prompts_at_once or mine, mine)
    longest = sorted(len(asked.prompt(prompt.asked)) for prompt in prompts)[-count:]
    needed = ranks * (sum(longest) + count * sampling.group_size * sampling.max_new_tokens)
    said = (
        f"sampling.mix_by token holds up to {needed} tokens of {ranks * count} prompts with their responses there "
        f"({ranks} ranks ask one server); raise it, or set sampling.prompts_at_once lower"
    )
    most = config.teacher.max_cache_tokens
    require(needed <= most, "teacher.max_cache_tokens", most, said)


class TokenMixture:
    """At each token, alpha p_T + (1 - alpha) pi; the teacher decodes beside the student (equal tokenizers)."""

    def __init__(self, link: TeacherLink, prompts: Sequence[Prompt], sampling: SamplingConfig) -> None:
        assert link.head is not None
        self._head, self._alpha = link.head, sampling.teacher_mix
        tokens = [link.prompt_tokens(p) for p in prompts]
        samples, longest = sampling.group_size, sampling.max_new_tokens
        self._decoding = link.client.decode(tokens, samples=samples, max_new_tokens=longest)

    def __call__(self, t: int, active_A: torch.Tensor, last_A: torch.Tensor, policy_AV: torch.Tensor) -> torch.Tensor:
        """See `sampling.Mixture`; nats, float32 [A, V]."""
        future = self._decoding.first if t == 0 else self._decoding.next(active_A.tolist(), last_A.tolist())
        teacher_AV = self._head(future.result()).float().log_softmax(-1).to(policy_AV.device)
        return mixed_logprobs(policy_AV, teacher_AV, self._alpha)

    def close(self) -> None:
        """Give the server's memory back."""
        self._decoding.close()


def mix_responses(actor: Actor, link: TeacherLink, rollout: Rollout, config: RunConfig, step: int) -> Rollout:
    """Each response is the teacher's with probability alpha, drawn by the prompt's own seed. Collective.

    The log-probabilities are the student's for every response, also for those that it did not write.
    """
    alpha, group = config.sampling.teacher_mix, rollout.group_size
    chosen: list[int] = []
    for n, prompt in enumerate(rollout.prompts_N):
        uniform_G = torch.rand(group, generator=random_stream(config.seed + 1, step, prompt.index))
        chosen += [n * group + g for g in torch.nonzero(uniform_G < alpha).flatten().tolist()]
    responses, finished_B = list(rollout.responses_B), rollout.finished_B.clone()
    if chosen:
        prompts_B = rollout.prompt_of_response()
        asked = [(prompts_B[b].index * group + b % group, prompts_B[b]) for b in chosen]
        for b, (tokens, ended) in zip(chosen, _written(link, asked, config, step), strict=True):
            responses[b], finished_B[b] = tokens, ended
    return _with_logprobs(actor, replace(rollout, responses_B=responses, finished_B=finished_B))


def teacher_rollout(
    actor: Actor, link: TeacherLink, prompts: Sequence[Prompt], config: RunConfig, step: int
) -> Rollout:
    """One answer of the teacher to each prompt, as a rollout with G = 1. Collective."""
    asked = [(prompt.index, prompt) for prompt in prompts]
    written = _written(link, asked, config, step, temperature=config.distill.answer_temperature)
    rollout = Rollout(
        prompts_N=list(prompts),
        group_size=1,
        responses_B=[tokens for tokens, _ in written],
        finished_B=torch.tensor([ended for _, ended in written], dtype=torch.bool),
        texts_B=[],
        behavior_logprobs_S=torch.zeros(0),
        sampled_logprobs_S=torch.zeros(0),
    )
    return _with_logprobs(actor, rollout)


def _written(
    link: TeacherLink, asked: Sequence[tuple[int, Prompt]], config: RunConfig, step: int, *, temperature: float = 1.0
) -> list[tuple[tuple[int, ...], bool]]:
    """The teacher's answers in the student's tokens, and whether each has ended. Random numbers belong to (seed, step,
    number of the answer), so that it makes no difference which are asked for together."""
    drawn = {"temperature": temperature, "seed": config.seed * 1_000_003 + step, "numbers": [n for n, _ in asked]}
    return link.responses([prompt for _, prompt in asked], config.sampling.max_new_tokens, **drawn)


def _with_logprobs(actor: Actor, rollout: Rollout) -> Rollout:
    """The rollout with texts and the student's log-probabilities of whatever its responses are now. Collective."""
    logprobs_S = actor.logprobs(rollout)
    return replace(
        rollout,
        texts_B=[actor.asked.said(response) for response in rollout.responses_B],
        behavior_logprobs_S=logprobs_S,
        sampled_logprobs_S=logprobs_S,
    )


def importance_of(rollout: Rollout, teacher: TeacherView, config: RunConfig) -> torch.Tensor:
    """Weights pi_b / q of a mixed rollout, float32 [S]."""
    behavior_S, lengths_B = rollout.behavior_logprobs_S, rollout.lengths_B
    if config.sampling.mix_by == "token":
        return mixture_importance(behavior_S, rollout.sampled_logprobs_S, lengths_B, by=config.sampling.mix_weight)
    return response_mixture_importance(behavior_S, teacher.logprobs_S, lengths_B, config.sampling.teacher_mix)
