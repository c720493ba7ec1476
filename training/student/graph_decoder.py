"""A decoding step of the student as a CUDA graph."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

import torch

from inference.attention.static_decode import StaticDecodePlan
from training.student.policy import Policy

log = logging.getLogger(__name__)
SPAN = 128
"""Tokens of a response by which what a graph reads of its cache grows: half as many are read in vain."""


class StaticDecoder:
    """Steps that ask nothing of the host, so that a CUDA graph can hold one; N prompts with G responses, B = N*G.

    A step is more than a thousand small kernels in a 7B model; a graph starts them all at once. It needs the same
    shapes, the same addresses and no word from the host in each step (`StaticDecodePlan`): tokens are chosen on the
    device, and a response that has ended stays in the batch. A graph lasts for SPAN tokens of one rollout: the next
    reads more of the cache, and the next rollout has other prompts, and perhaps its weights elsewhere.

    Not run yet on a GPU. On the CPU the tests play a recording of a step's operations as a graph would
    (tests/support/recorded_graph.py).
    """

    def __init__(
        self,
        policy: Policy,
        plan: StaticDecodePlan,
        first_BV: torch.Tensor,
        choose: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> None:
        """`first_BV`: logits [B, V] of each response's first token, which is chosen here. `choose`: from logits [B, V]
        and t, int64 [1] on the device, to the tokens t of the responses, int64 [B]; it may not wait for the device."""
        self._policy, self._plan, self._choose = policy, plan, choose
        self._tokens_B = choose(first_BV, plan.step_1)
        self._passes = 0
        self._replay: Callable[[], None] | None = None

    def advance(self) -> None:
        """Choose the next token of each response."""
        if self._passes % SPAN:
            (self._replay or self._step)()
        else:
            self._replay = None  # lets go of the graph before, and of its memory
            self._read = min(self._passes + SPAN, self._plan.max_new_tokens)
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
        if not self._policy.capturable or self._passes + 2 >= self._plan.max_new_tokens:
            return
        try:
            self._replay = captured(self._step)
        except Exception as error:  # a model's class may do anything in a step: wait for the device, copy from the host
            self._policy.capturable = False
            # Ending a broken capture fails as well, and says less.
            text, name = " ".join(str(error.__context__ or error).split())[:200], type(self._policy.model).__name__
            log.warning("a decoding step of %s cannot be a CUDA graph, sampling goes on without: %s", name, text)


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """The step as a CUDA graph; it is not run."""
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    # Other threads may go on using the device. The outer context brings the stream back when the capture fails to.
    capture = torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")
    try:
        with torch.cuda.stream(torch.cuda.current_stream()), capture:
            step()
    except Exception:
        # torch leaves its allocator in a capture that broke, and later that fails to free what it keeps.
        with contextlib.suppress(RuntimeError):
            for leave in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
                leave(torch.cuda.current_device(), pool)
        raise
    return graph.replay
