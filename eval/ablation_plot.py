"""The ablation as a picture: four measures side by side, a row for each variant, a dot for each seed."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from eval.ablation_plan import Plan
from eval.report_plots import GRID, INK, STYLE

if TYPE_CHECKING:
    from eval.ablation import Result

TITLES = {
    "f1": "Held-out F1 (%)\nhigher is better",
    "reverse_kl": "Reverse KL (nats a token)\nlower is better",
    "bits_per_byte": "Bits a byte, held-out text\nlower is better",
    "language_rate": "Faroese continuations (%)\nhigher is better",
}
# Okabe and Ito's colours, told apart by colour-blind readers; the shape says the same once more.
MARKS = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"))


def draw(plan: Plan, results: Sequence[Result]) -> bytes:
    """The PNG."""
    variants = [v for v in plan.variants if any(result.task.variant.name == v.name for result in results)]
    groups = [group for group in plan.groups if any(v.group == group for v in variants)]
    rows, labels, place = {}, [], 0.0
    for group in groups:
        for variant in (v for v in variants if v.group == group):
            rows[variant.name] = (place, groups.index(group))
            labels.append(variant.name)
            place += 1.0
        place += 0.6
    with rc_context(STYLE):
        figure = Figure(figsize=(10.5, 0.9 + 0.27 * (place + 1)), layout="constrained")
        panels = figure.subplots(1, len(TITLES), sharey=True)
        for axes, (key, title) in zip(panels, TITLES.items(), strict=True):
            _panel(axes, key, rows, results)
            axes.set_title(title, fontsize=9, loc="left")
        panels[0].set_yticks([rows[label][0] for label in labels], labels, family="monospace")
        panels[0].set_ylim(place - 0.2, -0.8)
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=130)
    return out.getvalue()


def _panel(axes: Axes, key: str, rows: dict[str, tuple[float, int]], results: Sequence[Result]) -> None:
    """One measure."""
    for name, (place, group) in rows.items():
        values = [result.after[key] for result in results if result.task.variant.name == name]
        colour, shape = MARKS[group % len(MARKS)]
        axes.plot(values, [place] * len(values), shape, color=colour, markersize=4, alpha=0.55, markeredgewidth=0)
        mean = statistics.mean(values)
        axes.plot([mean, mean], [place - 0.32, place + 0.32], color=colour, linewidth=2.2)
    start = statistics.mean(result.before[key] for result in results)
    axes.axvline(start, color=INK, linestyle="--", linewidth=1, label="start (after the warm-up)")
    if key != "reverse_kl":  # the teacher's to itself is 0
        teacher = statistics.mean(result.teacher[key] for result in results)
        axes.axvline(teacher, color=INK, linestyle=":", linewidth=1.2, label="teacher")
    else:
        axes.set_xlim(left=0)
    if key == "f1":
        axes.plot([], [], "o", color=INK, alpha=0.55, markersize=4, markeredgewidth=0, label="a seed")
        axes.plot([], [], "|", color=INK, markersize=9, markeredgewidth=2.2, label="mean")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="both", color=GRID)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
