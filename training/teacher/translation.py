"""A response of the student as the teacher reads it, and which student token answers for each teacher token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rewards.alignment import owners, read_bytes, student_token_of
from training.teacher.token_bytes import TokenBytes


@dataclass(frozen=True)
class Translation:
    """One response in teacher tokens."""

    tokens: tuple[int, ...]
    """M teacher token ids, its end symbol last where the student's response has ended."""
    student_token: tuple[int, ...]
    """For each of them, the index of the student token that it belongs to (rewards/alignment.py)."""
    unread: int
    """Student tokens of which the teacher reads nothing: the beginning of a character that was cut off."""


class Translator:
    """From the student's tokens to the teacher's, by way of bytes."""

    def __init__(self, student: TokenBytes, teacher: TokenBytes, space: int = 0) -> None:
        """`space`: an answer begins with one space more (1) or less (-1) for the teacher: only one of them is asked in
        its chat template."""
        self._space = space
        self.student = student
        self.teacher = teacher
        names = {name: token for token, name in teacher.symbols.items()}
        self._same_symbol = {token: names[name] for token, name in student.symbols.items() if name in names}

    def translate(self, response: Sequence[int], *, finished: bool, end_token: int) -> Translation:
        """`finished`: the last token is an end symbol of the student, and the teacher's `end_token` stands for it.

        A special symbol inside a response is the teacher's of the same name, and its name as text where it has none.
        """
        tokens: list[int] = []
        targets: list[int] = []
        unread = 0
        words = list(response[:-1]) if finished else list(response)
        start = 0
        while start < len(words):
            if words[start] in self._same_symbol:
                tokens.append(self._same_symbol[words[start]])
                targets.append(start)
                start += 1
                continue
            stop = next((t for t in range(start, len(words)) if words[t] in self._same_symbol), len(words))
            complete = finished or stop < len(words)
            part, owner, left = self._text(words[start:stop], complete=complete, space=self._space if start == 0 else 0)
            tokens += part
            targets += [start + t for t in owner]
            unread += left
            start = stop
        if finished:
            tokens.append(end_token)
            targets.append(len(response) - 1)
        return Translation(tuple(tokens), tuple(targets), unread)

    def _text(self, words: Sequence[int], *, complete: bool, space: int) -> tuple[list[int], list[int], int]:
        """Teacher tokens of a stretch of text, the student token of each, and how many student tokens go unread."""
        pieces = [self.student.piece(t) for t in words]
        reading, owner = read_bytes(b"".join(pieces), complete=complete), owners(pieces)
        read = len(owner) - reading.unread
        unread = len(set(owner[read:]) - set(owner[:read]))
        if not reading.text:
            return [], [], unread
        text, moved = reading.text, 0
        if space > 0:
            text, moved = " " + text, -1
        elif space < 0 and text.startswith(" ") and len(text) > 1:
            text, moved = text[1:], 1
        encoded = self.teacher.encode(text)
        if encoded.ends is None:  # where the pieces are is not known: the total goes to the last token that is read
            return list(encoded.tokens), [owner[read - 1]] * len(encoded.tokens), unread
        ends = [max(end + moved, 1) for end in encoded.ends] if moved else encoded.ends
        return list(encoded.tokens), student_token_of(ends, reading, owner), unread
