"""Two tokenizers, token for token: the teacher's log-probabilities of its own tokens, carried to the student's tokens.

Both tokenizers cut the same bytes. A student token owns the bytes that it wrote; **a teacher token's whole
log-probability goes to the student token that wrote the teacher token's last byte.** So

- the total of a response is preserved: nothing is split, and nothing is left over;
- equal tokenizers give the identity;
- a student token is not credited with what later student tokens wrote: the log-probability of a teacher token is known
  only when its last byte is, so all student tokens that had a hand in it have it in their return from there on, and
  the reward before a token does not depend on that token. (Spreading it evenly over its bytes would give part of it to
  an earlier token, whose share then depends on a later choice which is not credited with it: a biased policy gradient.)
  What is left of the future is where the teacher's tokenizer cuts, which may look beyond a byte.

Student tokens inside a longer teacher token therefore get 0, and the last of them gets all of it. Pure functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Reading:
    """What the teacher reads of the bytes that the student wrote."""

    text: str
    """The bytes as text."""
    origin: tuple[int, ...]
    """For each byte of `text` in UTF-8, the index of the student's byte that it stands for; never decreasing."""
    unread: int
    """Bytes at the end that are the beginning of a character only, and are left out."""


def read_bytes(data: bytes, *, complete: bool) -> Reading:
    """The text in `data`, which need not be valid UTF-8.

    Invalid bytes are read as U+FFFD, one for each invalid stretch as Python's decoder and Hugging Face's do: the
    teacher sees what a reader would see, and finds it unlikely. (Left out, garbage would cost nothing.) The beginning
    of a character at the end is left out unless the response is `complete`: it was cut at the longest allowed length,
    and the rest might have made it right.
    """
    parts: list[str] = []
    origin: list[int] = []
    at = 0
    while at < len(data):
        try:
            part, valid, bad = data[at:].decode(), len(data), len(data)
            cut = False
        except UnicodeDecodeError as error:
            valid, bad = at + error.start, at + error.end
            part = data[at:valid].decode()
            cut = error.reason == "unexpected end of data"
        parts.append(part)
        origin.extend(range(at, valid))
        if cut and not complete:
            return Reading("".join(parts), tuple(origin), len(data) - valid)
        if valid < bad:
            parts.append(REPLACEMENT)
            origin.extend([bad - 1] * len(REPLACEMENT.encode()))
        at = bad
    return Reading("".join(parts), tuple(origin), 0)


def owners(pieces: Sequence[bytes]) -> list[int]:
    """For each byte of the pieces laid end to end, the index of the piece that it is in. Empty pieces own nothing."""
    return [index for index, piece in enumerate(pieces) for _ in piece]


def ends_of_pieces(pieces: Sequence[bytes], text: bytes) -> list[int] | None:
    """Where each piece ends in `text` (0 to len(text)); None where the pieces do not spell the text.

    A tokenizer of sentencepiece may put a space in front of a text that has none: it counts as no byte of the text.
    """
    spelled = b"".join(pieces)
    added = 0 if spelled == text else 1 if spelled == b" " + text else None
    if added is None:
        return None
    return [max(end - added, 0) for end in accumulate(len(piece) for piece in pieces)]


def ends_of_offsets(ends: Sequence[int], text: str) -> list[int]:
    """Byte positions of character positions, made never to decrease; for tokenizers that change the text (NFKC)."""
    bytes_before = [0, *accumulate(len(char.encode()) for char in text)]
    return list(accumulate((bytes_before[min(end, len(text))] for end in ends), max))


def student_token_of(ends: Sequence[int], reading: Reading, owner: Sequence[int]) -> list[int]:
    """For each teacher token, which ends behind byte `ends[j]` of the read text, the student token it belongs to.

    A teacher token in front of the first byte belongs to the first student token that wrote something.
    """
    return [owner[reading.origin[max(end, 1) - 1]] for end in ends]


def carry(teacher_logprobs: Sequence[float], student_token: Sequence[int], length: int) -> list[float]:
    """Log-probabilities of `length` student tokens, nats: the sum over the teacher tokens that belong to each.

    In Python's float64, so the total differs from that of `teacher_logprobs` by the order of the additions only.
    """
    out = [0.0] * length
    for logprob, token in zip(teacher_logprobs, student_token, strict=True):
        out[token] += logprob
    return out
