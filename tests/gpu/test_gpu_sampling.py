"""Sampling on the device: recorded log-probabilities, seeds, greedy decoding."""

from __future__ import annotations

import pytest
import torch

from configs.schema import SamplingConfig
from inference.attention.packing import groups_of, in_batch_order, pack
from tests.gpu.device import DEVICE, KERNELS, ON_DEVICE, PROMPTS, policy_on
from tests.support.student_models import FAMILIES
from training.data.order import random_stream
from training.student.policy import Policy
from training.student.sampling import Drawing, Samples, sample

pytestmark = ON_DEVICE
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
"""Mean nats a token: the order of sums, and the limit of training/student/sampling_check.py for rounding to 8 bits."""


def drawn(policy: Policy, prompts: list[tuple[int, ...]], first: int = 0, *, greedy: bool = False) -> Samples:
    """G = 4 responses to each prompt, seeds by the prompt's place."""
    config = SamplingConfig(group_size=1 if greedy else 4, max_new_tokens=10, temperature=0.8)
    streams = None if greedy else [random_stream(0, 3, first + i) for i in range(len(prompts))]
    return sample(policy.eval(), prompts, config, Drawing((2,), streams))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_recorded_is_what_the_training_forward_says(
    family: str, dtype: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    KERNELS[kernel](monkeypatch)
    # Weights of a tenth: in bfloat16 the wild ones of the other tests round by more than a nat, whoever computes them.
    policy = policy_on(DEVICE, family, dtype, grouped=True)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.3)
        samples = drawn(policy, PROMPTS)
        rows = pack(groups_of(PROMPTS, samples.responses_B, 4), 64)
        values = [policy(row.to(DEVICE), temperature=0.8).logprobs_S.cpu() for row in rows]
    assert len(samples.full_logprobs_S) > 50
    assert float((in_batch_order(rows, values) - samples.full_logprobs_S).abs().mean()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("family", FAMILIES)
def test_seeds_do_not_depend_on_the_batch(family: str) -> None:
    """In float32: another batch shape may take another kernel, whose last bits differ, and a draw that lies that close
    to the border of two tokens (about 1e-6 of them) falls differently. In bfloat16 it would be one in some hundred."""
    policy = policy_on(DEVICE, family, "float32", grouped=True)
    together = drawn(policy, PROMPTS).responses_B
    alone = [r for i, prompt in enumerate(PROMPTS) for r in drawn(policy, [prompt], i).responses_B]
    assert list(together) == alone
    assert list(drawn(policy, PROMPTS).responses_B) == list(together)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_plain_rows_on_the_cpu(family: str) -> None:
    ours = drawn(policy_on(DEVICE, family, "float32", grouped=True), PROMPTS, greedy=True).responses_B
    plain = drawn(policy_on(torch.device("cpu"), family, "float32", grouped=False), PROMPTS, greedy=True).responses_B
    assert ours == plain
