"""Checks of `training/main.py --doctor` between student and teacher: tokens, end symbols, tensor parallelism."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from inference.checks import check_teacher
from inference.client import TeacherClient
from inference.doctor import TOLERANCE
from inference.fingerprint import tokenizer_fingerprint
from inference.launch import start_local_teacher
from training import distributed
from training.doctor_checks import Finding, Patient
from training.teaching import TeacherLink


def tensor_parallel(patient: Patient) -> Finding:
    """The teacher's scores of the same responses with another number of processes."""
    teacher, link = patient.config.teacher, patient.models.teacher
    if not patient.local_teacher:
        return Finding(None, "not checked: remote teacher")
    here = teacher.tensor_parallel
    other, path = (1 if here > 1 else 2), Path(teacher.path)
    try:
        check_teacher(path, other)
    except ValueError:
        return Finding(None, f"the teacher's heads cannot be dealt to {other} processes")
    if not distributed.is_main():
        return Finding(True, "")
    rollout, limit = patient.rollout, TOLERANCE[teacher.dtype]
    fingerprint = tokenizer_fingerprint(patient.config.student.path) if link.same_tokenizer else None
    again = replace(teacher, tensor_parallel=other, address=None, port=0)
    with start_local_teacher(again, path, patient.setup.folder.path / "teacher-again") as server:
        client = TeacherClient(
            server.address, secret=server.secret, tokenizer_fingerprint=fingerprint, timeout_s=teacher.timeout_s
        )
        second = TeacherLink(client, patient.setup.facts, None)
        try:
            theirs_BR = second.ask(rollout, whole_distribution=False)().logprobs_BR
        finally:
            second.close()
    ours_BR = link.ask(rollout, whole_distribution=False)().logprobs_BR
    gap = float((ours_BR - theirs_BR)[rollout.mask_BR].abs().max())
    return Finding(
        gap <= limit,
        f"the teacher on {here} and on {other} processes: log-probabilities differ by at most {gap:.1e} nats "
        f"(allowed {limit:.0e})",
    )


def tokenizers(patient: Patient) -> Finding:
    """Whether a token id means the same to both, and what is done where it does not."""
    student, teacher = patient.config.student.path, patient.config.teacher.path
    prints = tokenizer_fingerprint(student), tokenizer_fingerprint(teacher)
    if prints[0] == prints[1]:
        return Finding(
            patient.models.teacher.same_tokenizer, f"one tokenizer ({prints[0][:8]}): student tokens are teacher tokens"
        )
    if patient.models.teacher.same_tokenizer:
        return Finding(False, f"two tokenizers ({prints[0][:8]}, {prints[1][:8]}), but the run takes them for one")
    other = AutoTokenizer.from_pretrained(teacher)
    texts = [prompt.text for prompt in patient.rollout.prompts]
    changed = [t for t in texts if other.decode(other(t)["input_ids"], skip_special_tokens=True).strip() != t.strip()]
    return Finding(
        not changed,
        f"two tokenizers ({prints[0][:8]}, {prints[1][:8]}): text is tokenised again for the teacher, "
        f"whose scores come back token for token; {len(changed)} of {len(texts)} prompts change on the way (allowed 0)",
    )


def named_end_tokens(path: str | Path) -> tuple[int, ...]:
    """Every end symbol that a model directory names: generation_config.json, config.json, the tokenizer."""
    found: set[int] = set()
    values = [AutoTokenizer.from_pretrained(path).eos_token_id]
    for name in ("generation_config.json", "config.json"):
        if (Path(path) / name).is_file():
            content = json.loads((Path(path) / name).read_text(encoding="utf-8"))
            values += [content.get("eos_token_id"), (content.get("text_config") or {}).get("eos_token_id")]
    for value in values:
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return tuple(sorted(found))


def end_symbols(patient: Patient) -> Finding:
    """Trap: a student that ends otherwise than its teacher learns never to end."""
    ours, theirs = patient.actor.end_tokens, named_end_tokens(patient.config.teacher.path)
    teacher = AutoTokenizer.from_pretrained(patient.config.teacher.path)

    def names(tokenizer: Any, ids: tuple[int, ...]) -> str:
        return ", ".join(f"{tokenizer.convert_ids_to_tokens(i)} ({i})" for i in ids) or "none"

    both = f"student ends with {names(patient.actor.tokenizer, ours)}; teacher with {names(teacher, theirs)}"
    if patient.models.teacher.same_tokenizer:
        strange = sorted(set(ours) - set(theirs))
        return Finding(not strange, f"{both}; {len(strange)} of the student's are unknown to the teacher (allowed 0)")
    return Finding(teacher.eos_token_id is not None, f"{both}; each side's own stands for the other's")
