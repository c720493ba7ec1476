"""From rows and scores to cells: which differences count, and which numbers may not be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from configs.io.results import Value
from eval.measures.intervals import difference
from eval.pages.compare_models import Entrant
from eval.pages.compare_scores import GROUPS, ORDER, Score, measure

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row's number on one measure."""

    score: Score
    change: Value | None = None
    """Against `base` on the same examples, 95 %; None where nothing can be paired."""
    paired: int = 0
    """Examples in that pairing."""
    base: str = ""
    """Name of the row that it is compared with; none for a baseline and for published figures."""
    marks: tuple[str, ...] = ()
    """Letters of the notes that say why it may not be compared."""

    @property
    def clear(self) -> bool:
        """The interval of the change does not hold 0."""
        return self.change is not None and ((self.change.low or 0.0) > 0 or (self.change.high or 0.0) < 0)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that the tables and pages show."""

    entrants: list[Entrant]
    keys: list[str]
    """Measures that some row has; those of a group in the order of its table."""
    cells: dict[tuple[str, str], Cell]
    """By (row's name, key)."""
    notes: dict[str, str] = field(default_factory=dict)
    """By letter."""

    @property
    def baselines(self) -> list[str]:
        """Names of the rows that others are compared with."""
        return list(dict.fromkeys(cell.base for cell in self.cells.values() if cell.base))

    def cell(self, entrant: Entrant, key: str) -> Cell | None:
        """None where the row has no such number."""
        return self.cells.get((entrant.name, key))

    def groups(self) -> list[tuple[str, list[str], list[Entrant]]]:
        """(group, its keys, its rows), without empty ones."""
        found = []
        for group in GROUPS:
            keys = [key for key in self.keys if measure(key).group == group]
            rows = [one for one in self.entrants if any(self.cell(one, key) for key in keys)]
            if rows:
                found.append((group, keys, rows))
        return found


def compare(entrants: Sequence[Entrant]) -> Comparison:
    """A student is compared with its own start; where that has no such number, and any other row, with the first row
    that has it and was measured here: the student before, usually."""
    found = dict.fromkeys(key for one in entrants for key in one.scores)
    # Those that are known in the order of their list, then the others as they come.
    keys = sorted(found, key=lambda key: ORDER.index(key) if key in ORDER else len(ORDER))
    cells: dict[tuple[str, str], Cell] = {}
    letters: dict[str, str] = {}
    for key in keys:
        rows = [one for one in entrants if key in one.scores]
        measured = [one for one in rows if one.kind != "published"]
        for one in rows:
            score = one.scores[key]
            marks = [_letter(letters, score.caveat)] if score.caveat else []
            own = (row for row in rows if row.kind == "before" and row.source == one.start)
            base = None if one.kind == "published" else next(own, measured[0])
            change, paired = None, 0
            if base is not None and one is not base:
                differing = unlike(base.scores[key], score)
                if differing:
                    marks.append(_letter(letters, f"not comparable with {base.name}: other {', '.join(differing)}"))
                else:
                    change, paired = _change(score, base.scores[key])
            against = "" if base is None or base is one else base.name
            cells[one.name, key] = Cell(score=score, change=change, paired=paired, base=against, marks=tuple(marks))
    notes = {letter: text for text, letter in letters.items()}
    return Comparison(entrants=list(entrants), keys=keys, cells=cells, notes=notes)


def unlike(first: Score, second: Score) -> list[str]:
    """Names of the conditions in which two scores differ; empty where they may be compared."""
    names = {**first.conditions, **second.conditions}
    return [name for name in names if first.conditions.get(name) != second.conditions.get(name)]


def gap_closed(comparison: Comparison, key: str, student: Entrant) -> float | None:
    """Share of the way from what a student is compared with to its teacher, in percent; None where there is no such
    way."""
    teachers = [one for one in comparison.entrants if one.kind == "teacher" and one.source == student.teacher]
    end = comparison.cell(student, key)
    if not teachers or end is None:
        return None
    cells = [comparison.cells.get((end.base, key)), end, comparison.cell(teachers[0], key)]
    if any(cell is None or cell.marks for cell in cells):
        return None
    start, now, goal = (cell.score.value for cell in cells if cell is not None)
    better = goal - start if measure(key).higher_is_better else start - goal
    return 100.0 * (now - start) / (goal - start) if better > 0 else None


def _change(score: Score, base: Score) -> tuple[Value | None, int]:
    if score.examples is None or base.examples is None:
        return None, 0
    change, paired = difference(score.examples, base.examples) or (Value(0.0), 0)
    return None if change.low is None else change, paired


def _letter(letters: dict[str, str], text: str) -> str:
    """The letter of a note, the same for the same words."""
    if text not in letters:
        count = len(letters)
        letters[text] = LETTERS[count % 26] * (count // 26 + 1)
    return letters[text]
