"""The comparison as one HTML page (templates/compare.html.j2): tables, charts, answers side by side, sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from configs.schema import flat
from eval.pages.compare_models import Entrant
from eval.pages.compare_scores import GROUPS, LANGUAGES, measure
from eval.pages.compare_tables import READING
from eval.pages.comparison import Comparison, gap_closed
from eval.pages.page_parts import answer_cards, answer_key, bounds, drawn, number, render, signed
from eval.pages.report_plots import Plot
from eval.pages.run_files import RunFiles

SHOWN_TRANSLATIONS = 6
NOT_COMPARED = ("name", "runs_dir", "cache_dir", "report_to", "threads")
"""Settings that change no number."""
HEADLINES = (
    "heldout/f1",
    "heldout/reverse_kl",
    "heldout/open_kl",
    "euroeval/foqa/f1",
    "euroeval/scala-fo/mcc",
    "bits/fo",
)


def render_comparison(comparison: Comparison, plots: Mapping[str, list[Plot]], title: str) -> str:
    """The whole page. `plots`: by group."""
    answers = {one.name: one.answers for one in comparison.entrants if one.answers}
    shared = _shared([{answer_key(row): row for row in rows} for rows in answers.values()])
    return render(
        "compare.html.j2",
        title,
        comparison=comparison,
        headlines=_headlines(comparison),
        groups=[_group(comparison, *group) | {"plots": plots.get(group[0], [])} for group in comparison.groups()],
        measure=measure,
        cards=answer_cards(shared, answers),
        asked=len(shared),
        translations=_translations(comparison),
        reading=READING,
        baselines=comparison.baselines,
        published=sorted({one.source for one in comparison.entrants if one.kind == "published"}),
    )


def render_curves(runs: Sequence[RunFiles], plots: Sequence[Plot], title: str) -> str:
    """The curves of several runs laid over each other, and the settings in which they differ."""
    settings = [flat(run.settings) for run in runs]
    keys = [key for key in dict.fromkeys(key for one in settings for key in one) if key not in NOT_COMPARED]
    rows = [(key, [one.get(key, "–") for one in settings]) for key in keys]
    differing = [(key, values) for key, values in rows if any(value != values[0] for value in values)]
    return render("curves.html.j2", title, runs=runs, settings=differing, plots=plots)


def _headlines(comparison: Comparison) -> list[tuple[str, str]]:
    """What training changed, in one line each: (row's name, words)."""
    sources = {one.name: one.source for one in comparison.entrants}
    lines = []
    for one in comparison.entrants:
        for key in HEADLINES:
            cell = comparison.cell(one, key)
            base = None if cell is None else comparison.cells.get((cell.base, key))
            if one.kind != "after" or cell is None or base is None or (cell.marks and cell.change is None):
                continue
            digits, found = measure(key).digits, measure(key)
            group = f"{GROUPS[found.group]}, " if found.group != "euroeval" else ""
            whose = "" if sources[cell.base] == one.start else f" ({cell.base})"  # its own start goes without saying
            values = number(base.score.value, digits) + whose, number(cell.score.value, digits)
            text = f"{group}{found.name}: {' to '.join(values)}"
            if cell.change is not None:
                text += f", {signed(cell.change.value, digits)} {bounds(cell.change, digits, signed)}"
            closed = gap_closed(comparison, key, one)
            if closed is not None:
                text += f"; {number(closed, 0)} % of the way to the teacher"
            lines.append((one.name, text))
    return lines


def _group(comparison: Comparison, group: str, keys: Sequence[str], rows: Sequence[Entrant]) -> dict[str, Any]:
    """One kind of evaluation: what its table shows, and a note above it."""
    better = {measure(key).higher_is_better for key in keys}
    note = "" if len(better) > 1 else f"{'Higher' if better == {True} else 'Lower'} is better."
    cells = [cell for one in rows for key in keys if (cell := comparison.cell(one, key)) and cell.change]
    if paired := sorted({cell.paired for cell in cells}):
        unit = "questions or iterations of the harness" if group == "euroeval" else "examples"
        note += f" Changes are paired over {' or '.join(f'{n:,}' for n in paired)} {unit}."
    heads = [measure(key).name for key in keys]
    return {"name": GROUPS.get(group, group), "note": note, "heads": heads, "columns": keys, "rows": rows}


def _shared(said: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[Mapping[str, Any]]:
    """The rows of the first model whose keys all models have."""
    return [row for key, row in said[0].items() if all(key in found for found in said)] if said else []


def _translations(comparison: Comparison) -> list[tuple[str, Mapping[str, Any], dict[str, Mapping[str, Any]]]]:
    """(languages, sentence, how each model put it), the same sentences for all models that translated."""
    directions = dict.fromkeys(name for one in comparison.entrants for name in one.translations)
    cards = []
    for direction in directions:
        said = {
            one.name: {str(row["id"]): row for row in one.translations[direction]}
            for one in comparison.entrants
            if direction in one.translations
        }
        languages = " to ".join(LANGUAGES.get(side, side) for side in direction.split("-"))
        for row in drawn(_shared(list(said.values())), max(1, SHOWN_TRANSLATIONS // len(directions))):
            cards.append((languages, row, {name: found[str(row["id"])] for name, found in said.items()}))
    return cards
