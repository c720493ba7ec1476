"""A chart for each measure: a row for each model, its value as a mark, its 95 % interval as a line."""

from __future__ import annotations

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from eval.pages.compare_scores import GROUPS, measure
from eval.pages.comparison import Cell, Comparison
from eval.pages.page_parts import ranged
from eval.pages.report_plots import GRID, PALETTE, STYLE, Plot, save_plot, slug_of

# Colour and shape say the same, for who does not tell the colours apart.
MARKS = {
    "before": (PALETTE[5], "o"),
    "after": (PALETTE[0], "s"),
    "model": (PALETTE[3], "D"),
    "teacher": (PALETTE[2], "^"),
    "published": (PALETTE[1], "x"),
}
Row = tuple[str, str, Cell]


def draw_comparison(comparison: Comparison) -> dict[str, list[Plot]]:
    """Charts by group; a measure with a single number has none."""
    plots: dict[str, list[Plot]] = {}
    for group, keys, entrants in comparison.groups():
        for key in keys:
            rows = [(one.name, one.kind, cell) for one in entrants if (cell := comparison.cell(one, key)) is not None]
            if len(rows) > 1:
                plots.setdefault(group, []).append(_plot(key, rows))
    return plots


def _plot(key: str, rows: list[Row]) -> Plot:
    found = measure(key)
    group = GROUPS.get(found.group, found.group)
    title = found.name if found.group == "euroeval" else f"{group}: {found.name}"
    with rc_context(STYLE):
        figure = Figure(figsize=(3.7, 1.0 + 0.28 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        for place, (_, kind, cell) in enumerate(rows):
            _draw(axes, place, kind, cell)
        axes.set_yticks(range(len(rows)), [name + _marks(cell) for name, _, cell in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("higher is better" if found.higher_is_better else "lower is better")
        axes.grid(axis="x", color=GRID)
        axes.spines["left"].set_visible(False)
        return save_plot(figure, slug_of(key), title, _alt(title, found.digits, rows), dpi=300)


def _draw(axes: Axes, place: int, kind: str, cell: Cell) -> None:
    colour, shape = MARKS[kind]
    if cell.score.low is not None and cell.score.high is not None:
        axes.plot([cell.score.low, cell.score.high], [place, place], color=colour, linewidth=1.6, solid_capstyle="butt")
    fill = "none" if cell.marks else colour  # hollow: not to be compared
    axes.plot([cell.score.value], [place], shape, color=colour, markerfacecolor=fill, markersize=5, markeredgewidth=1.3)


def _marks(cell: Cell) -> str:
    return f" ({', '.join(cell.marks)})" if cell.marks else ""


def _alt(title: str, digits: int, rows: list[Row]) -> str:
    words = "; ".join(f"{name} {ranged(cell.score, digits)}{_marks(cell)}" for name, _, cell in rows)
    return f"{title}: {words}"
