"""Decoding whose steps ask nothing of the host, so that a CUDA graph can hold one.

A step of today's sizes is a thousand small kernels, which the host cannot start as fast as the device runs them. A
graph starts them all at once. It needs the same shapes, the same addresses and no word from the host in each step
(`StaticDecodePlan`), so that tokens are chosen on the device, and a response that has ended stays in the batch.

A graph lasts for SPAN tokens of one rollout: the next reads more of the cache, and the next rollout has other prompts,
and perhaps its weights elsewhere. To make one costs about what a step without a graph costs.

Not run yet on a GPU. On the CPU the tests play a recording of a step's operations as a graph would
(tests/support/recorded_graph.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from inference.attention.grouped import StaticDecodePlan
from training.student.decoders import prefilled
from training.student.policy import Policy

log = logging.getLogger(__name__)
SPAN = 128
"""Tokens of a response by which what is read of its cache grows: half as many are read in vain."""


class StaticDecoder:
    """N prompts with G responses each, all of them to the end; B = N*G."""

    def __init__(
        self,
        policy: Policy,
        prompts: Sequence[tuple[int, ...]],
        group_size: int,
        longest: int,
        choose: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> None:
        """`choose`: from logits [B, V] and t, int64 [1] on the device, to the tokens t of the responses, int64 [B]; it
        may not wait for the device. Token 0 is chosen here."""
        self._policy, self._longest, self._choose = policy, longest, choose
        cache, first_BV = prefilled(policy, prompts, group_size)
        self._plan = StaticDecodePlan(cache, group_size, longest)
        self._tokens_B = choose(first_BV, self._plan.step_1)
        self._passes = 0
        self._run: Callable[[], None] = self._step

    def advance(self) -> None:
        """Choose the next token of each response."""
        if self._passes % SPAN:
            self._run()
        else:
            self._run = self._step  # lets go of the graph before, and of its memory
            self._read = min(self._passes + SPAN, self._longest)
            self._step()  # makes what is made once: the cache, workspaces of the kernels
            self._capture()
        self._passes += 1

    def _step(self) -> None:
        """What a graph holds."""
        hidden = self._policy.hidden(self._tokens_B, self._plan.begin(self._read), self._plan)
        logits_BV = self._policy.logits(hidden)
        self._plan.step_1 += 1
        self._tokens_B.copy_(self._choose(logits_BV, self._plan.step_1))

    def _capture(self) -> None:
        """Run a graph from now on; where that cannot be, say so and go on without."""
        if not self._policy.capturable or self._passes + 2 >= self._longest:
            return
        try:
            self._run = captured(self._step)
        except Exception as error:  # a model's class may do anything in a step: wait for the device, copy from the host
            self._policy.capturable = False
            reason = error.__context__ or error  # ending a broken capture fails as well
            log.warning(
                "a decoding step of %s cannot be a CUDA graph, sampling goes on without: %s: %s",
                type(self._policy.model).__name__, type(reason).__name__, " ".join(str(reason).split())[:200],
            )  # fmt: skip


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """The step as a CUDA graph; it is not run."""
    graph = torch.cuda.CUDAGraph()
    # The outer context brings the stream back when the inner one fails to. Other threads may go on using the device.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay
