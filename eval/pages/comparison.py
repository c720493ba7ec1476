"""From rows and scores to cells: which differences count, and which numbers may not be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from eval.measures.intervals import difference
from eval.pages.compare_models import Entrant
from eval.pages.compare_scores import GROUPS, LANGUAGES, ORDER, Interval, Score, interval_of, measure

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row's number on one measure."""

    score: Score
    change: Interval | None = None
    """Against the baseline on the same examples, 95 %; None for the baseline itself, or where nothing can be paired."""
    paired: int = 0
    """Examples in that pairing."""
    marks: tuple[str, ...] = ()
    """Letters of the notes that say why it may not be compared."""

    @property
    def clear(self) -> bool:
        """The interval of the change does not hold 0."""
        return self.change is not None and (self.change.low > 0 or self.change.high < 0)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that the tables and pages show."""

    entrants: list[Entrant]
    keys: list[str]
    """Measures that some row has, in the order of the tables."""
    cells: dict[tuple[str, str], Cell]
    """By (row's name, key)."""
    baselines: dict[str, str]
    """Name of the row that the others are compared with, by key."""
    notes: dict[str, str] = field(default_factory=dict)
    """By letter."""

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
    """The baseline of a measure is the first row that has it and was measured here: the student before, usually."""
    keys = _ordered({key for one in entrants for key in one.scores})
    cells: dict[tuple[str, str], Cell] = {}
    baselines: dict[str, str] = {}
    letters: dict[str, str] = {}
    for key in keys:
        rows = [one for one in entrants if key in one.scores]
        base = next((one for one in rows if one.kind != "published"), None)
        if base is not None:
            baselines[key] = base.name
        for one in rows:
            score = one.scores[key]
            marks = [_letter(letters, score.caveat)] if score.caveat else []
            change, paired = None, 0
            if base is not None and one is not base and one.kind != "published":
                differing = unlike(base.scores[key], score)
                if differing:
                    marks.append(_letter(letters, f"not comparable with {base.name}: other {', '.join(differing)}"))
                else:
                    change, paired = _change(score, base.scores[key])
            cells[one.name, key] = Cell(score=score, change=change, paired=paired, marks=tuple(marks))
    notes = {letter: text for text, letter in letters.items()}
    return Comparison(entrants=list(entrants), keys=keys, cells=cells, baselines=baselines, notes=notes)


def unlike(first: Score, second: Score) -> list[str]:
    """Names of the conditions in which two scores differ; empty where they may be compared."""
    names = {**first.conditions, **second.conditions}
    return [name for name in names if first.conditions.get(name) != second.conditions.get(name)]


def gap_closed(comparison: Comparison, key: str, student: Entrant) -> float | None:
    """Share of the way from the baseline to the teacher, in percent; None where there is no such way."""
    teacher = next((one for one in comparison.entrants if one.kind == "teacher"), None)
    base = next((one for one in comparison.entrants if one.name == comparison.baselines.get(key)), None)
    if teacher is None or base is None or student in (base, teacher):
        return None
    cells = [comparison.cell(one, key) for one in (base, student, teacher)]
    if any(cell is None or cell.marks for cell in cells):
        return None
    start, end, goal = (cell.score.value for cell in cells if cell is not None)
    better = goal - start if measure(key).higher_is_better else start - goal
    return 100.0 * (end - start) / (goal - start) if better > 0 else None


def _change(score: Score, base: Score) -> tuple[Interval | None, int]:
    if score.examples is None or base.examples is None:
        return None, 0
    found = difference(score.examples, base.examples)
    return (interval_of(found[0]), found[1]) if found else (None, 0)


def _ordered(keys: set[str]) -> list[str]:
    """By group; known measures and languages first, in the order of their lists, and chrF++ before BLEU."""
    groups, languages = list(GROUPS), list(LANGUAGES)

    def place(key: str) -> tuple[int, int, list[int], bool, str]:
        group, _, rest = key.partition("/")
        names = rest.split("/")[0].split("-")
        spoken = [languages.index(name) if name in languages else len(languages) for name in names]
        return (
            groups.index(group) if group in groups else len(groups),
            ORDER.index(key) if key in ORDER else len(ORDER),
            spoken,
            key.endswith("bleu"),
            key,
        )

    return sorted(keys, key=place)


def _letter(letters: dict[str, str], text: str) -> str:
    """The letter of a note, the same for the same words."""
    if text not in letters:
        count = len(letters)
        letters[text] = LETTERS[count % 26] * (count // 26 + 1)
    return letters[text]
