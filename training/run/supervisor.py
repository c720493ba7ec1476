"""One start of a run from outside: what watches it, which exit code each way to end has, and what is said of it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from configs.checks import names_setting
from configs.io.claims import release
from configs.io.files import read_json, write_atomically
from configs.io.lines import LineFile, whole_rows
from configs.schema import RunConfig
from inference.client import TeacherLost, TeacherRefused
from inference.server.launch import TeacherDied
from training import distributed
from training.run.safe_points import Place, SafePoints, TimeLimit
from training.run.stopping import REQUEUE, RunFailed, StopRequest
from training.run.watchdog import Watchdog

log = logging.getLogger(__name__)
LOST_PEER = ("closed by peer", "reset by peer", "Broken pipe", "Socket Timeout", "Connection refused", "remote process")
"""What gloo's and NCCL's errors say when the other end of a collective has gone."""
FAILED, MISTAKE = 1, 2
"""Exit code of a run that a new start would not mend."""
GOES_ON = "the same command goes on from the last checkpoint"
TOKEN_BUDGET = "token_budget.json"
"""In the run's folder, where a start has ended to go on with half the budget."""
PASSES = ("reference", "update")
"""Phases that take less memory with fewer packed tokens in a pass. The loss does not depend on how a batch is cut into
passes: each of its terms has a denominator over all of them."""
NO_MEMORY = (
    "can't allocate memory",
    "out of memory",
    "std::bad_alloc",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""What torch's errors say, besides its OutOfMemoryError, where memory could not be had."""
ADVICE = {
    "sample": "set sampling.prompts_at_once, or take more ranks; in a new run lower sampling.group_size, "
    "sampling.max_new_tokens or prompts_per_step",
    "evaluation": "lower eval.batch",
}
"""What to lower, by the phase that ran out; elsewhere GENERAL."""
GENERAL = (
    "lower actor.micro_batch_tokens, set student.gradient_checkpointing, raise actor.zero_stage, or take more ranks; "
    "in a new run set actor.offload, or lower sampling.group_size or sampling.max_new_tokens (a group is never cut); "
    "`python training/main.py --plan` says what a run needs"
)


class Supervisor:
    """Methods are called by every rank; rank 0 writes starts.jsonl."""

    def __init__(self, config: RunConfig, folder: Path, stop: StopRequest) -> None:
        self._config, self._folder, self._stop = config, folder, stop
        self.points = SafePoints(stop, TimeLimit(config.time_limit_s))
        self.starts = Starts(folder)
        self._watchdog: Watchdog | None = None

    def watch(self, from_step: int) -> SafePoints:
        """The models are loaded, `from_step` steps are done; watch from now on."""
        if distributed.is_main():
            self.starts.begin(from_step, distributed.world_size())
        self.points.place = Place(from_step)
        self._watchdog = Watchdog(self._config.stuck_timeout_s, self.points, self._give_up)
        return self.points

    def stopped(self, step: int) -> int:
        """The loop has left with a checkpoint of `step` steps; returns the exit code.

        A start whose time did not suffice for one step would be followed by others like it.
        """
        timed_out = self.points.reason == "time limit" and not self.points.advanced
        code = FAILED if timed_out else self._stop.exit_code
        if timed_out:
            log.error("the time limit came before the end of the first step: give the job more time")
        elif distributed.is_main():
            log.info("stopped after step %d (%s)", step, self.points.reason)
        self.starts.end(self.points.reason, code, step)
        return code

    def failed(self, step: int) -> int:
        """The loop has given up with a checkpoint of `step` steps and has said why; returns the exit code."""
        self.starts.end("too many updates in a row had a non-finite loss or score", FAILED, step)
        return FAILED

    def finished(self, step: int) -> None:
        """Nothing is left that the ranks do together; rank 0 may still write a report, or upload, for as long as that
        takes."""
        if self._watchdog is not None:
            self._watchdog.rest()
        self.starts.end("finished", 0, step)

    def run(self, work: Callable[[], int]) -> int:
        """Exit code of `work`, however it ends; a mistake in the input (SystemExit) goes through. The folder is free
        then."""
        try:
            return self._ended(work)
        finally:
            release(self._folder)

    def _ended(self, work: Callable[[], int]) -> int:
        try:
            return work()
        except SystemExit as error:
            self.starts.end(self._stop.reason or "ended", int(error.code or 0))
            raise
        except TeacherLost as error:
            reason, code = f"{error}; run the same command again to go on from the last checkpoint", REQUEUE
        except TeacherDied as error:
            reason, code = str(error), MISTAKE if error.mistake else FAILED
        except (RunFailed, TeacherRefused) as error:
            refused = isinstance(error, TeacherRefused) and self._watchdog is None  # at the start: another secret, say
            reason, code = str(error), MISTAKE if refused else FAILED
        except Exception as error:
            if is_out_of_memory(error):
                reason, code = self._out_of_memory(error)
            elif is_lost_peer(error):
                reason, code = self._peer_lost(error)
            elif isinstance(error, ValueError) and names_setting(self._config, error):
                reason, code = " ".join(str(error).split()), MISTAKE
            else:
                log.exception("the run has failed")
                reason, code = f"{type(error).__name__}: {error}", FAILED
        log.error("%s", reason)
        self.starts.end(reason, code)
        return code

    def _out_of_memory(self, error: Exception) -> tuple[str, int]:
        """In a phase of passes the next start has half the token budget, once; then there is advice alone."""
        phase = self.points.place.phase
        said = " ".join(str(error).split())[:200] or type(error).__name__
        reason = f"rank {distributed.rank()}: out of memory in phase {phase} ({said}); {ADVICE.get(phase, GENERAL)}"
        if phase not in PASSES or not lower(self._config, self._folder):
            return reason, FAILED
        tokens = max(self._config.actor.micro_batch_tokens // 2, 1)
        return f"{reason}; the next start goes on from the last checkpoint with {tokens} tokens in a pass", REQUEUE

    def _peer_lost(self, error: Exception) -> tuple[str, int]:
        first = " ".join(str(error).split())[:200]
        if self._watchdog is None:
            said = (
                f"rank {distributed.rank()} lost its connection at the start: another rank has ended, or has not come"
            )
            return f"{said} ({first}); its own lines say why", FAILED
        place, who = self.points.place, self._watchdog.missing()
        reason = f"rank {distributed.rank()} lost its connection in phase {place.phase} of step {place.step + 1}: {who}"
        return f"{reason} ({first}); {GOES_ON}", self._again()

    def _give_up(self, reason: str) -> None:
        """End this process from the watchdog's thread; the main thread is in a collective that never ends."""
        code = self._again()
        log.error("rank %d is %s; %s", distributed.rank(), reason, GOES_ON)
        self.starts.end(reason, code)
        release(self._folder)
        sys.stderr.flush()
        os._exit(code)

    def _again(self) -> int:
        """A new start is worth it where this one got on; else it would meet the same."""
        return REQUEUE if self.points.advanced else FAILED


class Starts:
    """The starts of a run, in starts.jsonl. Written by one rank; a start without an end was killed."""

    def __init__(self, folder: Path, environment: Mapping[str, str] = os.environ) -> None:
        self._path = folder / "starts.jsonl"
        self._lines = LineFile(self._path)
        self._environment = environment
        self._open = False

    def begin(self, from_step: int, ranks: int) -> None:
        """A start begins: steps that were done before, and its number of ranks."""
        restarts = self._environment.get("SLURM_RESTART_COUNT", "0")
        self._append(
            "start",
            from_step=from_step,
            ranks=ranks,
            slurm_job=self._environment.get("SLURM_JOB_ID"),
            slurm_restart_count=int(restarts) if restarts.isdigit() else 0,
            host=socket.gethostname(),
        )
        self._open = True

    def end(self, reason: str, exit_code: int, step: int | None = None) -> None:
        """It ends: why, with which exit code, and how many steps are then done (None: not known). The first counts."""
        if self._open:
            self._open = False
            self._append("end", reason=reason, exit_code=exit_code, step=step)

    def listed(self) -> list[dict[str, Any]]:
        """One object a start: from_step, start, end, reason, exit_code, ...; reason `killed` where nothing was said."""
        found: list[dict[str, Any]] = []
        for row in whole_rows(self._path):
            time = row.pop("time")
            if row.pop("event") == "start":
                found.append({"start": time, **row, "end": None, "reason": None, "exit_code": None, "step": None})
            elif found:
                found[-1] |= {"end": time, **row}
        for start in found[:-1]:
            start["reason"] = start["reason"] or "killed"
        return found

    def _append(self, event: str, **values: Any) -> None:
        time = datetime.now(UTC).isoformat(timespec="seconds")
        with contextlib.suppress(OSError):  # a full disk; the log says the same
            self._lines.append(json.dumps({"event": event, "time": time, **values}))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of torch, CUDA or Python means that memory could not be had."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def is_lost_peer(error: Exception) -> bool:
    """Whether an exception of a collective, or of ranks that meet, means that another rank is not there."""
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in LOST_PEER)
    return said or isinstance(error, distributed.NOT_MET)


def lowered(config: RunConfig, folder: Path) -> RunConfig:
    """The configuration with the token budget that an earlier start of this run has halved."""
    path = folder / TOKEN_BUDGET
    if not path.is_file():
        return config
    tokens = int(read_json(path)["micro_batch_tokens"])
    return replace(config, actor=replace(config.actor, micro_batch_tokens=min(config.actor.micro_batch_tokens, tokens)))


def lower(config: RunConfig, folder: Path) -> bool:
    """Halve the token budget for the next start of this run; False where `config`, this start's, is halved already."""
    if (folder / TOKEN_BUDGET).is_file():
        return lowered(config, folder) != config  # another rank of this start ran out as well, and was first
    write_atomically(
        folder / TOKEN_BUDGET, json.dumps({"micro_batch_tokens": max(config.actor.micro_batch_tokens // 2, 1)})
    )
    return True
