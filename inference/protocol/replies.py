"""What the teacher says of itself."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

NONE = "none"
"""A fingerprint where there is nothing."""


@dataclass(frozen=True, kw_only=True)
class TeacherInfo:
    """What the teacher says of itself: JSON in the handshake."""

    model: str
    """Name of the model directory."""
    vocab_size: int
    hidden_size: int
    dtype: str
    """float32 or bfloat16: type of the model and of `hidden`."""
    max_positions: int
    """Longest prompt plus response, in tokens."""
    eos_ids: tuple[int, ...]
    tokenizer_fingerprint: str
    """"none" where the directory has no tokenizer; a client that has one is refused then."""
    output_layer: str
    """Hash of sampled rows of the output layer (inference/model/output_layer.py). "none" where logits are not that
    layer's product with hidden states, so that a client cannot have the whole distribution."""
    kinds: tuple[str, ...] = ()
    """Kinds of request that its backend answers; the server fills them in."""

    @staticmethod
    def from_json(value: dict[str, Any]) -> TeacherInfo:
        """From the handshake's JSON."""
        known = {field.name: value[field.name] for field in fields(TeacherInfo)}
        return TeacherInfo(**{**known, "eos_ids": tuple(known["eos_ids"]), "kinds": tuple(known["kinds"])})

    def same_teacher(self, other: TeacherInfo) -> bool:
        """Whether both would give the same scores: replicas and restarted servers must."""
        names = ("vocab_size", "hidden_size", "dtype", "tokenizer_fingerprint", "output_layer")
        return all(getattr(self, name) == getattr(other, name) for name in names)
