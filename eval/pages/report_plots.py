"""The curves of a run: each drawn once, as SVG for the page (in its light or dark colours) and as PNG."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Series = dict[str, list[float]]
Point = tuple[int, float]
Draw = Callable[[Axes], None]

# Colours of the PNG and of the light page; in the SVG each becomes a CSS variable, which the dark page sets anew.
INK, GRID = "#3b4252", "#d8dce4"
PALETTE = ("#2a6fdb", "#c8620a", "#1b7f4d", "#8a4bc2", "#b3315f", "#6b7280")
CSS_COLOURS = {INK: "var(--ink)", GRID: "var(--grid)"} | {
    colour: f"var(--series-{index})" for index, colour in enumerate(PALETTE)
}
DASHES = ("-", "--", ":")
"""Of the second and third six lines of a chart."""
STYLE = {
    "font.size": 9,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "svg.fonttype": "none",  # text stays text: selectable, and small
    "svg.hashsalt": "grpo-kd",  # the same run gives the same page
    "text.parse_math": False,
}

MOST = 1000
"""Points of a line or of a cloud: the page and the time that it takes do not grow with the run."""
PHASES = ("sample", "teacher", "reference", "update")
# key: title, unit, factor
CURVES = {
    "reward/mean": ("Reward", "mean of the responses", 1.0),
    "kl/teacher": ("Reverse KL to the teacher", "nats a token", 1.0),
    "kl/reference": ("KL to the reference", "nats a token", 1.0),
    "validation/f1": ("Validation F1", "%", 1.0),
    "validation/exact_match": ("Validation exact match", "%", 1.0),
    "validation/reverse_kl": ("Validation reverse KL to the teacher", "nats a token", 1.0),
    "length/mean": ("Response length", "tokens", 1.0),
    "length/finished_share": ("Responses that end by themselves", "%", 100.0),
    "loss/policy": ("Policy loss", "", 1.0),
    "loss/pt": ("Language-model loss on raw text (L_PT)", "nats a token", 1.0),
    "loss/bc": ("Behaviour-cloning loss (L_BC)", "nats a token", 1.0),
    "loss/kl": ("KL term of the loss", "nats a token", 1.0),
    "loss/single_step": ("Single-step KL (MiniLLM)", "nats a token", 1.0),
    "loss/value": ("Critic loss", "", 1.0),
    "loss/total": ("Total loss", "", 1.0),
    "grad_norm": ("Gradient norm", "", 1.0),
    "learning_rate": ("Learning rate", "", 1.0),
    "entropy": ("Entropy of the policy", "nats a token", 1.0),
    "clip_share": ("Clipped tokens", "%", 100.0),
    "tokens_per_second": ("Speed", "tokens a second", 1.0),
}
GROUPS = {
    "reward parts": ("Reward by part", "mean of the responses"),
    "seconds": ("Seconds of a step by phase", "seconds"),
    "mismatch": ("Sampling against training log-probabilities", "nats a token"),
}


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One small chart."""

    slug: str
    """Name in the PNG's file name."""
    alt: str
    """What the chart shows, for those who do not see it."""
    svg: str
    """Inline SVG whose colours are CSS variables."""
    png: bytes
    """The same on white."""


def draw_plots(steps: Sequence[int], metrics: Series) -> list[Plot]:
    """A chart for every key of metrics.jsonl; phases, reward parts and mismatches share one each."""
    if not steps:
        return []
    left = {key: values for key, values in metrics.items() if any(map(math.isfinite, values))}
    parts = {key: left.pop(key) for key in list(left) if key.startswith("reward/") and key != "reward/mean"}
    seconds = {key: left.pop(key) for key in list(left) if key.startswith("seconds/")}
    mismatch = {key: left.pop(key) for key in list(left) if key.startswith("mismatch/")}
    plots = []
    for key in [*(key for key in CURVES if key in left), *(key for key in left if key not in CURVES)]:
        title, unit, factor = CURVES.get(key, (key, "", 1.0))
        values = [value * factor for value in left[key]]
        alt, draw = _alt(title, unit, steps, values), _lines({title: (steps, values)}, [title])
        plots.append(_plot(slug_of(key), title, unit, alt, draw))
        if key == "reward/mean" and len(parts) > 1:
            plots.append(_group_plot("reward parts", steps, parts))
    if seconds:
        plots.append(_seconds_plot(steps, seconds))
    if mismatch:
        plots.append(_group_plot("mismatch", steps, mismatch))
    return plots


def draw_curves(runs: Mapping[str, tuple[Sequence[int], Series]]) -> list[Plot]:
    """A chart for each curve that a run (steps, metrics; by name) has, with a line for each run that has it."""
    plots = []
    for key, (title, unit, factor) in CURVES.items():
        lines = {
            name: (steps, [value * factor for value in metrics[key]])
            for name, (steps, metrics) in runs.items()
            if any(map(math.isfinite, metrics.get(key, ())))
        }
        if lines:
            alt = f"{title}: {'; '.join(_alt(name, unit, *line) for name, line in lines.items())}"
            draw = _lines(lines, list(runs))
            plots.append(_plot(slug_of(key), title, unit, alt, draw, 2.65 + 0.16 * len(lines)))
    return plots


def _lines(lines: Mapping[str, tuple[Sequence[int], Sequence[float]]], names: Sequence[str]) -> Draw:
    """Smoothed lines by name; one has the same colour and dashes in every chart, by its place in `names`. A line that
    is alone has its own points beside it, and no legend."""

    def draw(axes: Axes) -> None:
        for name, (steps, values) in lines.items():
            cycle, colour = divmod(names.index(name), len(PALETTE))
            known = [(s, v) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]
            points = list(zip(*outline(known), strict=True))
            if len(names) == 1 or len(known) == 1:
                axes.plot(*points, color=PALETTE[colour], linestyle="none", marker="o", markersize=2, alpha=0.35)
            shown = moving_average([s for s, _ in known], [v for _, v in known], smoothing_window(len(known)))
            dashes = DASHES[cycle % len(DASHES)]
            axes.plot(*shown, color=PALETTE[colour], linestyle=dashes, linewidth=1.5, label=name)
        if len(names) > 1:
            _legend(axes, ncols=2 if max(map(len, lines)) < 18 else 1)

    return draw


def outline(points: Sequence[Point]) -> list[Point]:
    """The points; of more than MOST the lowest and the highest of each stretch, so that no outlier is lost."""
    if len(points) <= MOST:
        return list(points)
    stretches = [points[len(points) * 2 * i // MOST : len(points) * 2 * (i + 1) // MOST] for i in range(MOST // 2)]
    return [p for s in stretches for p in sorted((min(s, key=itemgetter(1)), max(s, key=itemgetter(1))))]


def moving_average(steps: Sequence[int], values: Sequence[float], window: int) -> tuple[list[int], list[float]]:
    """Steps, and the mean over `window` of them around each, fewer at the ends; NaN is left out. Of more than MOST
    so many, evenly spaced, the first and the last among them: a chart has some hundred pixels."""
    every, last, count = np.asarray(values, float), len(steps) - 1, min(len(steps), MOST)
    places, means = [last * i // max(count - 1, 1) for i in range(count)], []
    for place in places:
        near = every[max(0, place - (window - 1) // 2) : place + window // 2 + 1]
        near = near[np.isfinite(near)]
        means.append(float(near.mean()) if len(near) else float("nan"))
    return [steps[place] for place in places], means


def smoothing_window(steps: int) -> int:
    """Steps in the moving average: a tenth of the run, odd; 1 (none) for short ones."""
    return 1 if steps < 10 else 2 * (steps // 20) + 1


def _group_plot(group: str, steps: Sequence[int], series: Series) -> Plot:
    """Several keys in one chart, each smoothed."""
    title, unit = GROUPS[group]
    lines = {key.split("/", 1)[1]: (steps, values) for key, values in series.items()}
    alt = "; ".join(_alt(key, unit, steps, values) for key, values in series.items())
    return _plot(slug_of(group), title, unit, f"{title}: {alt}", _lines(lines, list(lines)))


def _seconds_plot(steps: Sequence[int], seconds: Series) -> Plot:
    """Phases stacked; what the total holds beyond them is `other`."""
    title, unit = GROUPS["seconds"]
    total = seconds.get("seconds/total")
    named = {key.split("/", 1)[1]: np.nan_to_num(values) for key, values in seconds.items() if key != "seconds/total"}
    stack = {name: named[name] for name in [*PHASES, *(name for name in named if name not in PHASES)] if name in named}
    if total is not None:
        rest = np.nan_to_num(total) - sum(stack.values(), np.zeros(len(steps)))
        # Phases that overlap (the teacher scores while the reference is computed) can add up to more than the total.
        stack["other"] = np.maximum(rest, 0.0)

    def draw(axes: Axes) -> None:
        smooth = [moving_average(steps, list(values), smoothing_window(len(steps))) for values in stack.values()]
        means = [each for _, each in smooth]
        axes.stackplot(smooth[0][0], means, labels=list(stack), colors=PALETTE, alpha=0.85, linewidth=0)
        axes.set_ylim(bottom=0)
        _legend(axes)

    means = ", ".join(f"{name} {format_number(float(np.mean(values)))}" for name, values in stack.items())
    return _plot("seconds", title, unit, f"{title}, mean over the run: {means}", draw)


def _legend(axes: Axes, ncols: int = 3) -> None:
    """Above the curves, where it hides nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=ncols, frameon=False, fontsize=8, handlelength=1.2)


def _alt(title: str, unit: str, steps: Sequence[int], values: Sequence[float]) -> str:
    """First and last value in words."""
    known = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
    (first, start), (last, end) = known[0], known[-1]
    unit = f" {unit}" if unit else ""
    return f"{title}: {format_number(start)}{unit} at step {first}, {format_number(end)}{unit} at step {last}"


def format_number(value: float) -> str:
    """Four significant digits, without exponents where those hinder reading."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:.3g}"


def slug_of(key: str) -> str:
    return re.sub(r"[\W_]+", "-", key.lower()).strip("-") or "curve"


def _plot(slug: str, title: str, unit: str, alt: str, draw: Draw, height: float = 2.75) -> Plot:
    """Draw once, `height` inches high, save twice."""
    with rc_context(STYLE):
        figure = Figure(figsize=(4.3, height), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        return save_plot(figure, slug, title, alt)


def save_plot(figure: Figure, slug: str, title: str, alt: str, dpi: int = 160) -> Plot:
    """A finished figure as inline SVG and as PNG. Call within STYLE.

    It is laid out once: `savefig` would do so for each."""
    figure.suptitle(title, fontsize=10)
    vector, pixels = io.StringIO(), io.BytesIO()
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(vector, format="svg", transparent=True, metadata=nothing)  # on the page's own background
    figure.savefig(pixels, format="png", dpi=dpi)
    return Plot(slug=slug, alt=alt, svg=_inline(vector.getvalue(), slug), png=pixels.getvalue())


def _inline(svg: str, slug: str) -> str:
    """Matplotlib's SVG file as a part of an HTML page: no prologue, no addresses, own ids, the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head, body = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None  # matplotlib always writes one
    body = re.sub(r'\bid="([^"]+)"', rf'id="{slug}-\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{slug}-\1)", body)
    body = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{slug}-\1"', body)
    body = re.sub(r"#[0-9a-f]{6}\b", lambda found: CSS_COLOURS.get(found.group(), found.group()), body)
    body = re.sub(r"\s*\n\s*", "\n", body)
    return f'<svg {box.group()} aria-hidden="true">{body}'
