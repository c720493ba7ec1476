"""Out of memory in a pass: the step is taken again with half the packed tokens in a pass, once; then advice.

The loss does not depend on how a batch is cut into passes (each of its terms has a denominator over all of
them), so a step that is taken again gives what it would have given with the smaller budget from the start.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from training import distributed

log = logging.getLogger(__name__)
T = TypeVar("T")
WORDS = (
    "can't allocate memory",
    "out of memory",
    "std::bad_alloc",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""What torch's other errors for it say."""


class OutOfMemory(Exception):
    """A pass ran out of memory and every rank has left it; nothing has changed."""

    together = True
    """Whether the other ranks know."""


class OutOfMemoryAlone(OutOfMemory):
    """A pass ran out of memory on this rank, and the others are in a collective with it: the run has to start again."""

    together = False


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of torch, CUDA or Python means that memory could not be had."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)


def agreed(work: Callable[[], T], *, exchanging: bool) -> T:
    """What `work`, a stretch of passes, returns; OutOfMemory on every rank where one of them runs out. Collective.

    `exchanging`: the passes are collectives themselves (ZeRO 3), so that a rank that leaves them cannot meet the
    others any more: OutOfMemoryAlone, on this rank only.
    """
    done: list[T] = []
    failed = out_of_memory(lambda: done.append(work()))
    if exchanging and failed:
        raise OutOfMemoryAlone(failed)
    if not exchanging and distributed.any_rank(bool(failed)):
        raise OutOfMemory(failed or "on another rank")
    return done[0]


def out_of_memory(work: Callable[[], object]) -> str:
    """Do it; what was said where memory ran out, else nothing. The traceback, which holds the pass's tensors, is gone
    at the return."""
    try:
        work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return " ".join(str(error).split())[:200] or type(error).__name__
    return ""


class TokenBudget:
    """Packed tokens of a pass, for one model."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        """Most packed tokens of a pass now."""
        self._halved = False

    def spend(self, work: Callable[[int], T]) -> T:
        """`work(tokens)`, again with half of them where it raises OutOfMemory on every rank; the second time it is
        raised. Collective."""
        try:
            return work(self.tokens)
        except OutOfMemory as error:
            if self._halved or not error.together or self.tokens == 1:
                raise
            said = str(error)
        release()
        self.tokens, self._halved = self.tokens // 2, True
        if distributed.is_main():
            message = "out of memory (%s): taken again with half of actor.micro_batch_tokens, %d, which stays"
            log.warning(message, said, self.tokens)
        return self.spend(work)


def release() -> None:
    """Give what the abandoned passes held back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
