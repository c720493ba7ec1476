"""The student's decoding step: against a shared prompt cache, the host leading each step or a CUDA graph holding it, or
in plain rows (training/student/plain_decoders.py)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from inference.attention.grouped import DecodePlan, PrefillPlan, PromptCache, StaticDecodePlan
from inference.attention.packing import Group, pack_row
from training.student.plain_decoders import PlainDecoder, UncachedDecoder
from training.student.policy import Policy, Way

log = logging.getLogger(__name__)
SPAN = 128
"""Tokens of a response by which what a graph reads of its cache grows: half as many are read in vain."""


class Decoder(Protocol):
    """N prompts with G responses each, one token at a time; B = N*G."""

    first_BV: torch.Tensor
    """[B, V] logits of each response's first token, in the model's type."""

    def advance(self, rows_A: torch.Tensor, tokens_A: torch.Tensor) -> torch.Tensor:
        """[A, V] logits after `tokens_A` (int64) were chosen for the responses `rows_A` (int64, ascending).

        A response that is left out is finished and does not come back.
        """
        ...


def make_decoder(policy: Policy, prompts: Sequence[tuple[int, ...]], group_size: int, longest: int) -> Decoder:
    """The decoder that the model can take."""
    if policy.way is Way.PACKED:
        return GroupedDecoder(policy, prompts, group_size, longest)
    return (PlainDecoder if policy.way is Way.PLAIN else UncachedDecoder)(policy, prompts, group_size)


def prefilled(policy: Policy, prompts: Sequence[tuple[int, ...]], group_size: int) -> tuple[PromptCache, torch.Tensor]:
    """Keys and values of the prompts, and the logits [B, V] of each response's first token."""
    row = pack_row([Group(prompt=tuple(p), responses=()) for p in prompts]).to(next(policy.parameters()).device)
    prefill = PrefillPlan(row)
    hidden = policy.hidden(row.tokens_T, row.positions_T, prefill)
    last = torch.cumsum(prefill.cache.lengths_N, 0) - 1
    return prefill.cache, policy.logits(hidden[last]).repeat_interleave(group_size, 0)


class GroupedDecoder:
    """Each prompt is prefilled once; its responses decode against that one cache, each with a suffix of its own."""

    def __init__(self, policy: Policy, prompts: Sequence[tuple[int, ...]], group_size: int, longest: int) -> None:
        self._policy = policy
        self._device = next(policy.parameters()).device
        cache, self.first_BV = prefilled(policy, prompts, group_size)
        self._plan = DecodePlan(cache, group_size, longest)

    def advance(self, rows_A: torch.Tensor, tokens_A: torch.Tensor) -> torch.Tensor:
        """See `Decoder.advance`."""
        positions_A = self._plan.advance(rows_A.to(self._device))
        return self._policy.logits(self._policy.hidden(tokens_A.to(self._device), positions_A, self._plan))


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
        self._replay: Callable[[], None] | None = None

    def advance(self) -> None:
        """Choose the next token of each response."""
        if self._passes % SPAN:
            (self._replay or self._step)()
        else:
            self._replay = None  # lets go of the graph before, and of its memory
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
            self._replay = captured(self._step)
        except Exception as error:  # a model's class may do anything in a step: wait for the device, copy from the host
            self._policy.capturable = False
            # Ending a broken capture fails as well, and says less.
            text, name = " ".join(str(error.__context__ or error).split())[:200], type(self._policy.model).__name__
            log.warning("a decoding step of %s cannot be a CUDA graph, sampling goes on without: %s", name, text)


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """The step as a CUDA graph; it is not run."""
    graph = torch.cuda.CUDAGraph()
    # The outer context brings the stream back when the inner one fails to. Other threads may go on using the device.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay
