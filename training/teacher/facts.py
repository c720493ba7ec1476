"""What is known of a teacher before any model is loaded: its tokenizer beside the student's, and how each is asked."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import AutoConfig

from configs.prompts import Asked, Format
from configs.schema import RunConfig, TeacherConfig
from inference.model.output_layer import load_output_layer, logit_softcap
from inference.protocol.fingerprint import tokenizer_fingerprint
from training.data.prompts import format_of
from training.losses import OutputLayer
from training.run.launcher import environment_rank
from training.teacher.token_bytes import TokenBytes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TeacherFacts:
    """What is known of the teacher before a model is loaded."""

    path: Path
    """Its model directory; tokenizer and output layer are read from there."""
    same_tokenizer: bool
    """Student tokens are teacher tokens."""
    teacher: Format
    """How the teacher is asked."""
    student: Format
    """How the student is asked."""

    def head(self) -> OutputLayer | None:
        """What makes the teacher's logits of its hidden states, float32, with the rows of `exchanged` ends in each
        other's places; None with two tokenizers, and where its files hold none that can be read (quantised)."""
        if not self.same_tokenizer:
            return None
        try:
            layer_VD = load_output_layer(self.path).float()
        except ValueError:
            return None
        if self.exchanged:
            rows = list(self.exchanged)
            layer_VD[rows] = layer_VD[list(self.exchanged.values())]
        return OutputLayer(layer_VD, softcap=logit_softcap(self.path))

    @cached_property
    def columns(self) -> int:
        """Rows of the teacher's output layer."""
        return int(AutoConfig.from_pretrained(self.path).get_text_config().vocab_size)

    def described(self, prompt: Asked, columns: int) -> list[str]:
        """Four lines: how each model reads the end of a prompt, what ends an answer, and what has no probability. The
        student's matrix has `columns`."""
        known = {i for i in self.student.tokenizer.get_vocab().values() if i < columns}
        shared = sum(i < self.columns for i in known) if self.same_tokenizer else len(known)
        ends = [f"{one.tokenizer.convert_ids_to_tokens(one.end)!r} ({one.end})" for one in (self.student, self.teacher)]
        kinds = ["chat" if one.chat else "plain" for one in (self.student, self.teacher)]
        return [
            f"student sees ({kinds[0]}): ...{self.student.rendered(prompt)[-80:]!r}",
            f"teacher sees ({kinds[1]}): ...{self.teacher.rendered(prompt)[-80:]!r}",
            f"an answer ends with: {ends[0]} for the student, {ends[1]} for the teacher"
            + (", and each stands for the other" if ends[0] != ends[1] else ""),
            f"masked: {columns - shared} of the student's {columns} vocabulary columns: not a token of both models"
            if self.same_tokenizer
            else f"masked: {columns - shared} of the student's {columns} vocabulary columns: no token; two tokenizers",
        ]

    @cached_property
    def exchanged(self) -> dict[int, int]:
        """With one tokenizer: what ends the student's answers stands for what ends the teacher's, and the other way
        round (a base student with <|endoftext|>, an instruct teacher with <|im_end|>); empty where that is the same."""
        ours, theirs = self.student.end, self.teacher.end
        return {ours: theirs, theirs: ours} if self.same_tokenizer and ours != theirs else {}


def teacher_facts(config: RunConfig, teacher: TeacherConfig, key: str = "teacher") -> TeacherFacts:
    """Compare the two tokenizers. `key` is the teacher's setting. Raises ValueError as `format_of` does."""
    return TeacherFacts(
        Path(teacher.path),
        tokenizer_fingerprint(teacher.path) == tokenizer_fingerprint(config.student.path),
        format_of(key, teacher, config.data),
        format_of("student", config.student, config.data),
    )


def check_tokenizers(config: RunConfig, key_of_teacher: str, facts: TeacherFacts) -> None:
    """Raises ValueError where responses cannot be carried between the tokenizers. With one, whose tokens go as they
    are, a warning where an answer begins with a space for one of the two models only."""
    if facts.same_tokenizer and facts.student.lead != facts.teacher.lead and environment_rank() == 0:
        log.warning(
            "%s: student and teacher have one tokenizer, but one of them begins an answer with a space (in plain text) "
            "and the other without (in its chat template), and the first token is scored as it was written; end "
            "data.template in a line break, behind which both begin without",
            key_of_teacher,
        )
    if not facts.same_tokenizer:
        TokenBytes(facts.student.tokenizer, f"student.path = {config.student.path!r}")
        TokenBytes(facts.teacher.tokenizer, f"{key_of_teacher} = {str(facts.path)!r}")
