"""What the pages of this folder share: numbers in words, questions drawn and matched, templates made into a file."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unicodedata import category

from jinja2 import Environment, FileSystemLoader

HERE = Path(__file__).parent
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories of characters that nobody sees."""


def number(value: float, digits: int) -> str:
    """With a minus that is one, and none before a zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def signed(value: float, digits: int) -> str:
    """With a sign, and a minus that is one; a zero is not below zero."""
    return f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", "−")


def bounds(found: Any, digits: int, show: Callable[[float, int], str] = number) -> str:
    """`[18.2, 29.0]`."""
    return f"[{show(found.low, digits)}, {show(found.high, digits)}]"


def ranged(found: Any, digits: int, show: Callable[[float, int], str] = number) -> str:
    """`23.5 [18.2, 29.0]`; the value alone where it has no interval."""
    value = show(found.value, digits)
    return value if found.low is None else f"{value} {bounds(found, digits, show)}"


def render(template: str, title: str, **values: Any) -> str:
    """The page: one file, no script, nothing loaded from elsewhere. Every text is escaped, and `visible`."""
    pages = Environment(
        loader=FileSystemLoader(HERE / "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    pages.filters |= {"number": number, "signed": signed, "bounds": bounds}
    style = (HERE / "report.css").read_text(encoding="utf-8")
    return visible(pages.get_template(template).render(title=title, style=style, signed=signed, **values))


def visible(text: str) -> str:
    """The text with U+202E in place of that character, and so of all that show nothing but change what is shown:
    controls, marks of direction, joiners, other line ends, halves of characters. Line feeds and tabs stay."""
    hidden = {char for char in set(text) if category(char) in HIDDEN and char not in "\n\t"}
    return text.translate({ord(char): f"[U+{ord(char):04X}]" for char in hidden})


def drawn(rows: Sequence[Any], count: int) -> list[Any]:
    """So many rows, in order, drawn with a fixed seed: nobody has picked them."""
    return [rows[index] for index in sorted(random.Random(0).sample(range(len(rows)), min(count, len(rows))))]


def answer_key(row: Mapping[str, Any]) -> str:
    """What makes a question the same in two evaluations."""
    return str(row["id"]) if row.get("id") is not None else f"{row.get('context') or ''}\n{row.get('question')}"


def answer_cards(
    asked: Sequence[Mapping[str, Any]], answers: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[tuple[Mapping[str, Any], dict[str, Mapping[str, Any] | None]]]:
    """Ten of the questions, each with what every model (by name) said; None: was not asked."""
    said = {name: {answer_key(row): row for row in rows} for name, rows in answers.items()}
    return [(row, {name: found.get(answer_key(row)) for name, found in said.items()}) for row in drawn(asked, 10)]
