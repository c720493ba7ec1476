"""Responses that the teacher had a hand in: what is drawn for one does not depend on which others are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from configs.schema import RunConfig, SamplingConfig
from training.experience import Prompt, Rollout, join, take
from training.teacher.mixing import mix_responses, teacher_rollout

CONFIG = RunConfig(sampling=SamplingConfig(group_size=3, teacher_mix=0.5, mix_by="response"))


class Link:
    """A teacher whose answer to a prompt is the number that it is drawn with."""

    def responses(
        self, prompts: Sequence[Prompt], longest: int, *, numbers: Sequence[int], **drawn: Any
    ) -> list[tuple[tuple[int, ...], bool]]:
        return [((prompt.index, number), True) for prompt, number in zip(prompts, numbers, strict=True)]


def test_answers_of_the_teacher_are_drawn_alike_in_parts() -> None:
    """sampling.prompts_at_once and the number of ranks cut a step; two responses to a prompt are drawn apart."""
    actor: Any = SimpleNamespace(
        logprobs=lambda rollout: torch.zeros(int(rollout.lengths_B.sum())), asked=SimpleNamespace(said=str)
    )
    link: Any = Link()
    prompts = [Prompt(index=i, text="", tokens=(1,), answers=(), question="") for i in (4, 11, 2, 7)]
    own = Rollout(
        prompts_N=prompts, group_size=3, responses_B=[(0,)] * 12, finished_B=torch.ones(12, dtype=torch.bool),
        texts_B=[""] * 12, behavior_logprobs_S=torch.zeros(12), sampled_logprobs_S=torch.zeros(12),
    )  # fmt: skip
    whole, *parts = (mix_responses(actor, link, one, CONFIG, 5) for one in (own, take(own, [0]), take(own, [1, 2, 3])))
    assert list(join(*parts).responses_B) == list(whole.responses_B)
    written = [response for response in whole.responses_B if response != (0,)]
    assert len(set(written)) == len(written) > 3
    whole, *parts = (teacher_rollout(actor, link, some, CONFIG, 5) for some in (prompts, prompts[:1], prompts[1:]))
    assert list(join(*parts).responses_B) == list(whole.responses_B)
