"""The doctor's checks on a healthy run and on deliberately broken ones, in one process: JSON of every finding.

python tests/support/doctor_worker.py OUT.json FLAGS...   (flags of training/main.py)
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

import torch

from configs.schema import LossConfig
from inference.attention.decode import DecodePlan
from inference.attention.packing import PackedRow
from training.losses import PolicyTokens, TokenTerm, WholeDistribution, policy_loss, reverse_kl_term
from training.run.cli import demo_config, parse
from training.run.console import quiet_logging
from training.run.run_folder import RunFolder
from training.run.stopping import StopRequest
from training.stage2 import Setup, prepare
from training.student import actor, reference
from training.student.policy import Policy
from training.tools import doctor
from training.tools.doctor import CHECKS, first_step, small_step, start

OTHER_TEACHER = "the_other_teacher_has_other_weights"
"""The breakage that the check TP, which starts another server, has to see."""


@contextmanager
def sampled_at_another_temperature() -> Iterator[None]:
    """Trap 7: the sampler's temperature is not the one of the log-probabilities."""
    whole = actor.sample
    with mock.patch.object(
        actor, "sample", lambda p, x, config, drawing: whole(p, x, replace(config, temperature=1.0), drawing)
    ):
        yield


@contextmanager
def decoding_is_a_position_late() -> Iterator[None]:
    whole = DecodePlan.advance
    with mock.patch.object(DecodePlan, "advance", lambda self, rows: whole(self, rows) + 1):
        yield


@contextmanager
def each_micro_batch_has_its_own_mean() -> Iterator[None]:
    """Trap 22."""

    def loss(tokens: PolicyTokens, config: LossConfig) -> Any:
        return policy_loss(replace(tokens, weights_S=tokens.weights_S / tokens.weights_S.sum()), config)

    with mock.patch.object(actor, "policy_loss", loss):
        yield


@contextmanager
def positions_run_through_the_row() -> Iterator[None]:
    """They do not start again behind the prompt."""
    whole = Policy.response_states

    def states(self: Policy, row: PackedRow) -> torch.Tensor:
        return whole(self, replace(row, positions_T=torch.arange(len(row.tokens_T))))

    with mock.patch.object(Policy, "response_states", states):
        yield


@contextmanager
def the_kl_has_its_sign_turned() -> Iterator[None]:
    def turned(other: WholeDistribution) -> TokenTerm:
        whole = reverse_kl_term(other)
        return lambda logits_CV, piece: -whole(logits_CV, piece)

    with mock.patch.object(actor, "reverse_kl_term", turned):
        yield


@contextmanager
def the_reference_is_another_model() -> Iterator[None]:
    whole = reference.FrozenCopy.logprobs
    with mock.patch.object(reference.FrozenCopy, "logprobs", lambda self, rollout: whole(self, rollout) * 1.01):
        yield


@contextmanager
def the_teacher_ends_otherwise() -> Iterator[None]:
    """Trap 16."""
    with mock.patch.object(doctor, "named_end_tokens", return_value=(0,)):
        yield


@contextmanager
def the_tokenizers_differ_unnoticed() -> Iterator[None]:
    with mock.patch.object(doctor, "tokenizer_fingerprint", str):
        yield


@contextmanager
def the_other_teacher_has_other_weights() -> Iterator[None]:
    """As a wrong shard would make it: the second server serves the student."""
    whole = doctor.start_local_teacher
    student = Path(os.environ["DOCTOR_STUDENT"])
    with mock.patch.object(doctor, "start_local_teacher", lambda config, path, folder: whole(config, student, folder)):
        yield


BROKEN: dict[str, Callable[[], Any]] = {
    f.__name__: f
    for f in (
        sampled_at_another_temperature, decoding_is_a_position_late,
        each_micro_batch_has_its_own_mean, positions_run_through_the_row, the_kl_has_its_sign_turned,
        the_reference_is_another_model, the_teacher_ends_otherwise, the_tokenizers_differ_unnoticed,
        the_other_teacher_has_other_weights,
    )
}  # fmt: skip


def main(out: Path, flags: list[str]) -> None:
    """Examine the healthy run, then each broken one."""
    quiet_logging()
    config, facts, inputs = prepare(parse(flags, "", demo_config))
    findings: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        setup = Setup(small_step(config), inputs, facts, RunFolder(out.parent / "doctor"), StopRequest())
        probe = start(setup, stack)
        os.environ["DOCTOR_STUDENT"] = config.student.path
        for name, breakage in {"healthy": ExitStack, **BROKEN}.items():
            with breakage():
                ill = first_step(probe.run, local_teacher=True)
                chosen = [c for c in CHECKS if c != "TP" or name in ("healthy", OTHER_TEACHER)]
                findings[name] = {c: list(vars(CHECKS[c](ill)).values()) for c in chosen}
    out.write_text(json.dumps(findings))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    sys.stdout.flush()
    os._exit(0)
