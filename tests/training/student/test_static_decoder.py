"""Decoding in steps that a CUDA graph can hold: the same samples as the decoder that the host leads, for each family.

There is no CUDA here: the step's operations are recorded and played again (tests/support/recorded_graph.py). The graph
itself is tests/gpu/test_gpu_sampling.py's.
"""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs.schema import SamplingConfig
from inference.attention.static_decode import StaticDecodePlan
from tests.support.model_zoo import FAMILIES, PROMPTS, make
from tests.support.recorded_graph import Refused, recorded
from tests.training.student.test_model_zoo import DOCS
from training.data.order import random_stream
from training.experience import Samples
from training.student import graph_decoder, sampling
from training.student.policy import Policy, Way
from training.student.sampling import LOOK, Drawing, sample

PACKED = re.findall(r"^\| (\S+) \| packed rows \|", DOCS, re.MULTILINE)
Capture = Callable[[Callable[[], None]], Callable[[], None]]


def drawn(policy: Policy, *, ends: tuple[int, ...] = (2, 5, 9), greedy: bool = False, on_step: Any = None) -> Samples:
    """Two prompts of unlike lengths, four responses each, longer than the windows and than two spans."""
    config = SamplingConfig(group_size=4, max_new_tokens=22, temperature=0.9)
    streams = None if greedy else [random_stream(0, 0, prompt) for prompt in range(len(PROMPTS))]
    return sample(policy, PROMPTS, config, Drawing(ends, streams, on_step=on_step or (lambda _: None)))


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Callable[[Capture], None]:
    """Sample as on CUDA from now on, with this in place of the graph; spans are short."""

    def switch(capture: Capture) -> None:
        monkeypatch.setattr(graph_decoder, "SPAN", 8)
        monkeypatch.setattr(graph_decoder, "captured", capture)
        monkeypatch.setattr(sampling, "stays_on_device", lambda *_: True)

    return switch


def broken(step: Callable[[], None]) -> Callable[[], None]:
    """A capture in which something waited for the device."""
    try:
        raise Refused("nonzero waits\nfor the device")
    finally:  # as the end of a capture does
        raise RuntimeError("operation failed due to a previous error during capture")


def assert_same(ours: Samples, want: Samples) -> None:
    assert ours.responses_B == want.responses_B
    assert torch.equal(ours.finished_B, want.finished_B)
    # Rows read in spans are other products than rows read to their end: the last bits differ.
    torch.testing.assert_close(ours.behavior_logprobs_S, want.behavior_logprobs_S, atol=2e-5, rtol=0)
    torch.testing.assert_close(ours.sampled_logprobs_S, want.sampled_logprobs_S, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", PACKED)
def test_each_family_samples_the_same(family: str, on_device: Callable[[Capture], None]) -> None:
    """Without a graph, and as a recording that is played for all but the first step of each span."""
    policy = Policy(make(family))
    want = drawn(policy)
    on_device(lambda step: step)
    assert_same(drawn(policy), want)
    on_device(recorded)
    assert_same(drawn(policy), want)
    assert policy.capturable  # nothing in the step waits for the device


def test_the_families_are_those_of_the_table() -> None:
    assert len(PACKED) > 40
    assert set(PACKED) <= set(FAMILIES)


def test_greedy_and_with_columns_that_no_token_has(on_device: Callable[[Capture], None]) -> None:
    policy = Policy(make("llama"))
    policy.limit(45)
    want, greedy = drawn(policy), drawn(policy, greedy=True)
    on_device(recorded)
    assert_same(drawn(policy), want)
    assert_same(drawn(policy, greedy=True), greedy)
    assert policy.capturable
    assert max(token for response in want.responses_B for token in response) < 45


def test_ends_are_looked_at_now_and_then(on_device: Callable[[Capture], None]) -> None:
    """All have ended at the first token: LOOK are chosen, and one of each response is kept."""
    policy, steps, captures = Policy(make("llama")), [], []

    def capture(step: Callable[[], None]) -> Callable[[], None]:
        captures.append(len(steps))
        return step

    on_device(capture)
    everything = tuple(range(50))
    samples = drawn(policy, ends=everything, on_step=steps.append)
    assert steps == list(range(LOOK))
    assert [len(response) for response in samples.responses_B] == [1] * 8
    assert samples.finished_B.all()
    assert len(samples.behavior_logprobs_S) == 8
    steps.clear()
    captures.clear()
    samples = drawn(policy, ends=(), on_step=steps.append)
    assert steps == list(range(22))
    assert [len(response) for response in samples.responses_B] == [22] * 8
    assert not samples.finished_B.any()
    assert captures == [1, 9, 17]  # one for each span of 8 passes, the first of which follows token 0


def test_a_step_that_no_graph_can_hold_is_said_once(
    on_device: Callable[[Capture], None], caplog: pytest.LogCaptureFixture
) -> None:
    policy = Policy(make("llama"))
    want = drawn(policy)

    on_device(broken)
    assert_same(drawn(policy), want)
    assert not policy.capturable
    assert_same(drawn(policy), want)
    line = "a decoding step of LlamaForCausalLM cannot be a CUDA graph, sampling goes on without: nonzero "
    assert [record.getMessage() for record in caplog.records] == [line + "waits for the device"]


def test_a_broken_capture_leaves_torchs_allocator_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch ends that only where a capture ends well; afterwards its empty_cache fails (pytorch, CUDAGraph.cpp)."""

    @contextmanager
    def graph(*_: Any, pool: Any, **__: Any) -> Iterator[None]:
        with pytest.raises(Refused):
            yield
        left.append(("broken", pool))
        raise RuntimeError("operation failed due to a previous error during capture")

    def step() -> None:
        raise Refused

    left: list[Any] = []
    for name, value in {"CUDAGraph": object, "graph_pool_handle": lambda: (0, 7), "graph": graph}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("stream", "current_stream", "current_device"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: nullcontext())
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda _, pool, name=name: left.append((name, pool)), raising=False)
    with pytest.raises(RuntimeError, match="previous error"):
        graph_decoder.captured(step)
    assert left == [(name, (0, 7)) for name in ("broken", "_cuda_endAllocateToPool", "_cuda_releasePool")]


@pytest.mark.parametrize("capture", [recorded, broken])
def test_its_cache_goes_with_it(capture: Capture, on_device: Callable[[Capture], None]) -> None:
    """Gigabytes on a GPU, which the update needs: they may not wait for Python's collector of cycles."""
    on_device(capture)
    policy = Policy(make("llama"))
    cache, first_BV = sampling.prefilled(policy, PROMPTS, 4)
    plan = StaticDecodePlan(cache, 4, 22)
    decoder = graph_decoder.StaticDecoder(policy, plan, first_BV, lambda logits, t: logits.argmax(-1))
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            for _ in range(3):
                decoder.advance()
        left = weakref.ref(plan)
        del decoder, plan
        assert left() is None
    finally:
        gc.enable()


def test_where_it_is_chosen() -> None:
    def chosen(device: str = "cuda", way: Way = Way.PACKED, capturable: bool = True, **drawing: Any) -> bool:
        weights = [SimpleNamespace(device=torch.device(device))]
        policy: Any = SimpleNamespace(parameters=lambda: iter(weights), way=way, capturable=capturable)
        return sampling.stays_on_device(policy, Drawing((2,), None, **drawing))

    assert chosen()
    assert not chosen("cpu")
    assert not chosen(way=Way.PLAIN)
    assert not chosen(capturable=False)
    assert not chosen(mixture=lambda t, active, last, logprobs: logprobs)  # another process has a say in each token
    assert not chosen(any_rank=lambda active: active)  # ZeRO 3


def test_a_recording_is_as_strict_as_a_graph() -> None:
    """Else the tests above would show nothing: what Python counts stands still, what tensors count goes on."""
    told, counted, out = [1], torch.tensor([1]), torch.zeros(2, dtype=torch.int64)

    def step() -> None:
        out.copy_(torch.cat([counted * told[0], counted.view(1).add(0)]))
        counted.add_(1)
        told[0] += 1

    play = recorded(step)
    assert (counted.tolist(), out.tolist()) == ([1], [0, 0])  # a capture runs nothing on the device
    for expected in ([1, 1], [2, 2], [3, 3]):  # told[0] is 1 for good
        play()
        assert out.tolist() == expected
    for waits in (counted.item, counted.nonzero, lambda: counted[counted > 0]):
        with pytest.raises(Refused):
            recorded(waits)
