"""The comparison as one HTML page: tables, charts, answers side by side, sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from eval.compare_models import Entrant
from eval.compare_scores import GROUPS, LANGUAGES, measure
from eval.compare_tables import READING, answered, bounds, number
from eval.comparison import Cell, Comparison, gap_closed
from eval.page_parts import (
    answer_card,
    answer_key,
    answer_section,
    chart_grid,
    drawn,
    page,
    signed,
    table_region,
    written,
)
from eval.report_plots import Plot

SHOWN_ANSWERS = 10
SHOWN_TRANSLATIONS = 6
HEADLINES = ("heldout/f1", "heldout/reverse_kl", "euroeval/foqa/f1", "euroeval/scala-fo/mcc", "bits/fo")


def render_comparison(comparison: Comparison, plots: Mapping[str, list[Plot]], title: str) -> str:
    """The whole page. `plots`: by group."""
    sections = [_group(comparison, *group, plots.get(group[0], [])) for group in comparison.groups()]
    empty = "" if sections else "<section><p>No evaluation yet.</p></section>"
    return page(
        title,
        [
            f"<header><h1>{escape(title)}</h1>{_headlines(comparison)}</header>",
            empty,
            *sections,
            _answers(comparison),
            _translations(comparison),
            _notes(comparison),
        ],
    )


def _headlines(comparison: Comparison) -> str:
    """What training changed, in one line each."""
    lines = []
    for one in comparison.entrants:
        for key in HEADLINES:
            cell = comparison.cell(one, key)
            if one.kind != "after" or cell is None or key not in comparison.baselines:
                continue
            base = comparison.cells[comparison.baselines[key], key]
            if cell is base or (cell.marks and cell.change is None):
                continue
            digits, found = measure(key).digits, measure(key)
            group = f"{GROUPS[found.group]}, " if found.group != "euroeval" else ""
            text = f"{group}{found.name}: {number(base.score.value, digits)} to {number(cell.score.value, digits)}"
            if cell.change is not None:
                text += f", {signed(cell.change.value, digits)} {bounds(cell.change, digits, signed)}"
            closed = gap_closed(comparison, key, one)
            if closed is not None:
                text += f"; {number(closed, 0)} % of the way to the teacher"
            lines.append(f"<li><strong>{escape(one.name)}.</strong> {escape(text)}.</li>")
    return f'<ul class="headlines">{"".join(lines)}</ul>' if lines else ""


def _group(
    comparison: Comparison, group: str, keys: Sequence[str], rows: Sequence[Entrant], plots: Sequence[Plot]
) -> str:
    """One kind of evaluation: its table and its charts."""
    name = GROUPS.get(group, group)
    head = "".join(f'<th scope="col">{escape(measure(key).name)}</th>' for key in keys)
    body = "".join(
        f'<tr><th scope="row">{escape(one.name)}</th>'
        + "".join(f"<td>{_cell(comparison.cell(one, key), key, one.kind)}</td>" for key in keys)
        + "</tr>"
        for one in rows
    )
    better = {measure(key).higher_is_better for key in keys}
    way = {frozenset({True}): "Higher is better.", frozenset({False}): "Lower is better."}.get(frozenset(better), "")
    unit = "questions or iterations of the harness" if group == "euroeval" else "examples"
    paired = sorted(
        {cell.paired for one in rows for key in keys if (cell := comparison.cell(one, key)) and cell.change}
    )
    count = f" Changes are paired over {' or '.join(f'{n:,}' for n in paired)} {unit}." if paired else ""

    table = f"""<table class="comparison">
<thead><tr><td></td>{head}</tr></thead>
<tbody>{body}</tbody>
</table>"""
    return f"""<section>
<h2>{escape(name)}</h2>
<p class="note">{way}{count}</p>
{table_region(name, table)}
{chart_grid(plots) if plots else ""}
</section>"""


def _cell(cell: Cell | None, key: str, kind: str) -> str:
    if cell is None:
        return "–"
    found = measure(key)
    marks = f"<sup>{', '.join(cell.marks)}</sup>" if cell.marks else ""
    text = f'<span class="value">{number(cell.score.value, found.digits)}{marks}</span>'
    if cell.score.interval is not None:
        text += f'<span class="range">{bounds(cell.score.interval, found.digits)}</span>'
    if cell.change is not None:
        good = (cell.change.value > 0) == found.higher_is_better
        # Only what was trained is good or bad; that a teacher is better is no news.
        tone = ("right" if good else "wrong") if cell.clear and kind != "teacher" else "unclear"
        text += f'<span class="range change {tone}">{signed(cell.change.value, found.digits)}</span>'
        text += f'<span class="range {tone}">{bounds(cell.change, found.digits, signed)}</span>'
    return text


def _answers(comparison: Comparison) -> str:
    """The same questions, what each model said."""
    rows = answered(comparison)
    if not rows:
        return ""
    said = {one.name: {answer_key(row): row for row in one.answers} for one in rows}
    shared = [row for row in rows[0].answers if all(answer_key(row) in found for found in said.values())]
    if not shared:
        return ""
    chosen = drawn(shared, SHOWN_ANSWERS)
    cards = [answer_card(row, {name: found[answer_key(row)] for name, found in said.items()}) for row in chosen]
    return answer_section("Answers side by side", cards, len(shared))


def _translations(comparison: Comparison) -> str:
    """The same sentences, how each model put them."""
    directions = dict.fromkeys(name for one in comparison.entrants for name in one.translations)
    cards = []
    for direction in directions:
        said = {
            one.name: {str(row["id"]): row for row in one.translations[direction]}
            for one in comparison.entrants
            if direction in one.translations
        }
        first = next(iter(said.values()))
        shared = [row for key, row in first.items() if all(key in found for found in said.values())]
        for row in drawn(shared, max(1, SHOWN_TRANSLATIONS // len(directions))):
            cards.append(_translation_card(direction, row, said))
    if not cards:
        return ""
    return f"""<section>
<h2>Translations side by side</h2>
<p class="note">Sentences drawn at random.</p>
<div class="cards">
{"".join(cards)}
</div>
</section>"""


def _translation_card(direction: str, row: Mapping[str, Any], said: Mapping[str, Mapping[str, Any]]) -> str:
    languages = " to ".join(LANGUAGES.get(side, side) for side in direction.split("-"))
    lines = "".join(
        f"<dt>{escape(name)}</dt><dd>{written(found[str(row['id'])]['written'])}</dd>" for name, found in said.items()
    )
    return f"""<article>
<h3>{escape(row["source"])}</h3>
<dl><dt>{escape(languages)}</dt><dd>{escape(row["reference"])}</dd>{lines}</dl>
</article>"""


def _notes(comparison: Comparison) -> str:
    """How to read it, what may not be compared, and where everything is from."""
    notes = "".join(f"<li><sup>{letter}</sup> {escape(text)}</li>" for letter, text in comparison.notes.items())
    sources = "".join(
        f"<dt>{escape(one.name)}</dt><dd><code>{escape(one.source)}</code></dd>"
        for one in comparison.entrants
        if one.kind != "published"
    )
    addresses = sorted({one.source for one in comparison.entrants if one.kind == "published"})
    cited = f"<dt>Published figures</dt><dd>{escape(', '.join(addresses))}</dd>" if addresses else ""
    baselines = dict.fromkeys(comparison.baselines.values())
    base = f" Baseline: {escape(', '.join(baselines))}." if baselines else ""
    return f"""<section>
<h2>Reading</h2>
<p class="note">{escape(READING)}{base}</p>
{f'<ul class="marks">{notes}</ul>' if notes else ""}
<dl class="sources">{sources}{cited}</dl>
</section>"""
