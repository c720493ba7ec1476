"""Out of memory in a pass: the step is taken again with half the packed tokens in a pass, once; then advice.

The loss does not depend on how a batch is cut into passes (each of its terms has a denominator over all of
them), so a step that is taken again gives what it would have given with the smaller budget from the start.
"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from configs.files import write_atomically
from configs.schema import RunConfig
from training import distributed

log = logging.getLogger(__name__)
T = TypeVar("T")
FILE = "token_budget.json"
"""In the run's folder, where a start has ended to go on with half the budget."""
WORDS = ("can't allocate memory", "out of memory", "std::bad_alloc")
"""What torch's other errors for it say."""
ADVICE = {
    "sample": "lower sampling.group_size, sampling.max_new_tokens or prompts_per_step, or take more ranks",
    "evaluation": "lower eval.batch",
}
"""What to lower, by the phase that ran out; elsewhere GENERAL."""
GENERAL = (
    "lower actor.micro_batch_tokens (a group is never cut: then sampling.group_size or sampling.max_new_tokens), set "
    "student.gradient_checkpointing, raise actor.zero_stage, set actor.offload, or take more ranks; "
    "`python training/main.py --plan` says what a run needs"
)


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


def advice(phase: str) -> str:
    """What to change where a phase ran out of memory although the token budget was halved."""
    return ADVICE.get(phase, GENERAL)


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


def lowered(config: RunConfig, folder: Path) -> RunConfig:
    """The configuration with the token budget that an earlier start of this run has halved."""
    path = folder / FILE
    if not path.is_file():
        return config
    tokens = int(json.loads(path.read_text(encoding="utf-8"))["micro_batch_tokens"])
    return replace(config, actor=replace(config.actor, micro_batch_tokens=min(config.actor.micro_batch_tokens, tokens)))


def lower(config: RunConfig, folder: Path) -> bool:
    """Halve the token budget for the next start of this run; False where that was done before."""
    if (folder / FILE).is_file():
        return False
    write_atomically(folder / FILE, json.dumps({"micro_batch_tokens": max(config.actor.micro_batch_tokens // 2, 1)}))
    return True


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
            log.warning("out of memory (%s): taken again with half of actor.micro_batch_tokens, %d, which stays", said,
                        self.tokens)  # fmt: skip
        return self.spend(work)


def release() -> None:
    """Give what the abandoned passes held back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
