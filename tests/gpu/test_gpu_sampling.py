"""Sampling on the device: recorded log-probabilities, seeds, greedy decoding."""

from __future__ import annotations

import pytest
import torch

from configs.schema import SamplingConfig
from inference.attention.packing import groups_of, in_batch_order, pack
from tests.gpu.device import DEVICE, KERNELS, ON_DEVICE, PROMPTS, a_row, policy_on, with_graph
from tests.support.student_models import FAMILIES
from training.data.order import random_stream
from training.experience import Samples
from training.student import sampling
from training.student.policy import Policy
from training.student.sampling import Drawing, sample

pytestmark = ON_DEVICE
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
"""Mean nats a token: the order of sums, and the limit of training/student/sampling_check.py for rounding to 8 bits."""


def drawn(
    policy: Policy, prompts: list[tuple[int, ...]], first: int = 0, *, greedy: bool = False, tokens: int = 10
) -> Samples:
    """G = 4 responses to each prompt, seeds by the prompt's place."""
    config = SamplingConfig(group_size=1 if greedy else 4, max_new_tokens=tokens, temperature=0.8)
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
    assert len(samples.behavior_logprobs_S) > 50
    assert float((in_batch_order(rows, values) - samples.behavior_logprobs_S).abs().mean()) <= TOLERANCE[dtype]


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


def by_the_host(policy: Policy) -> Samples:
    """What the decoder says that has no graph."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "stays_on_device", lambda *_: False)
        return drawn(policy, PROMPTS, tokens=40)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_captured_graph_samples_the_same(
    family: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Three graphs a rollout, two rollouts, the weights changed between them."""
    policy = policy_on(DEVICE, family, "float32", grouped=True)
    with_graph(monkeypatch)
    for _ in range(2):
        want, ours = by_the_host(policy), drawn(policy, PROMPTS, tokens=40)
        assert policy.capturable, caplog.text
        assert ours.responses_B == want.responses_B
        torch.testing.assert_close(ours.behavior_logprobs_S, want.behavior_logprobs_S, atol=1e-4, rtol=0)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(0.9)


def test_a_step_that_waits_for_the_device_goes_on_without_a_graph(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The device has to be usable after a capture that broke, and on the stream that it was on."""
    policy = policy_on(DEVICE, "llama", "float32", grouped=True)
    want, logits = by_the_host(policy), policy.logits
    with_graph(monkeypatch)
    monkeypatch.setattr(policy, "logits", lambda hidden: logits(hidden * (float(hidden.detach().sum()) < float("inf"))))
    stream = torch.cuda.current_stream() if DEVICE.type == "cuda" else None
    for _ in range(2):
        assert drawn(policy, PROMPTS, tokens=40).responses_B == want.responses_B
    assert not policy.capturable
    assert [record.getMessage()[:52] for record in caplog.records] == [
        "a decoding step of LlamaForCausalLM cannot be a CUDA"
    ]
    if stream is not None:
        assert torch.cuda.current_stream() == stream
        torch.cuda.empty_cache()  # fails where torch's allocator believes that the capture goes on
    policy(a_row().to(DEVICE)).logprobs_S.sum().backward()
