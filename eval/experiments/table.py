"""The results of an experiment as a frame, Markdown tables and a picture: mean and deviation over seeds."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.stats import t as student_t

from configs.io.results import read_result
from eval.experiments.plan import Plan, Task, models_of, summary_of
from eval.measure import FILES
from eval.measures.model import output_folder
from eval.pages.report_plots import GRID, INK, STYLE

STAGES = {"start": "eval_before", "after": "eval_after", "teacher": "teacher_eval"}
"""Key of summary.json by stage."""
# Okabe and Ito's colours, told apart by colour-blind readers; the shape says the same once more.
MARKS = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"))


def read_table(plan: Plan, tasks: Sequence[Task], runs_dir: Path) -> pandas.DataFrame:
    """A row for each finished run and stage: variant, group, seed, where the run began, the seconds of the run that had
    made that, stage and its model, tokens, seconds and the plan's columns, NaN where there is no such number."""
    rows = []
    for task in tasks:
        if (summary := summary_of(runs_dir / task.name)) is None:
            continue
        models = models_of(runs_dir / task.name)
        before = summary_of(Path(models["start"]).parent) or {}
        for stage, model in models.items():
            found = dict(summary.get(STAGES[stage]) or {})
            for name in plan.measures:
                file = output_folder(model, runs_dir) / FILES.get(name, f"{name}.json")
                found |= {key: one.value for key, one in read_result(file).values.items()} if file.is_file() else {}
            rows.append(
                {
                    "variant": task.variant.name,
                    "group": task.variant.group,
                    "seed": task.seed,
                    "start": models["start"],
                    "warmup": (before.get("seconds") or {}).get("total", math.nan),
                    "stage": stage,
                    "model": model,
                    "tokens": (summary.get("tokens") or {}).get("sampled", math.nan),
                    "seconds": (summary.get("seconds") or {}).get("total", math.nan),
                    **{key: found.get(key, math.nan) for key in plan.columns},
                }
            )
    return pandas.DataFrame(rows).astype(dict.fromkeys(plan.columns, float))  # a file has null for NaN


def spread(values: pandas.Series, digits: int, sign: bool = False) -> str:
    """`mean ± sample standard deviation`; one value alone has no deviation, and none is a dash."""
    known = values.dropna()
    if known.empty:
        return "–"
    mean = f"{known.mean():{'+' if sign else ''}.{digits}f}"
    return mean if len(known) < 2 else f"{mean} ± {known.std():.{digits}f}"


def _number(value: float) -> str:
    return f"{value:.0f}" if math.isfinite(value) else "–"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main_table(plan: Plan, table: pandas.DataFrame) -> list[str]:
    """Each variant, and how far it went from the start of the same run."""
    heads = [title for column in plan.columns.values() for title in (column.title, "change")]
    lines = [_row(["variant", *heads, "tokens (k)", "seconds"]), "| --- |" + " ---: |" * (len(heads) + 2)]
    # The same for all that began alike with a seed; a program that does not evaluate its start leaves it to them.
    starts, teachers = (
        table[table.stage == stage].groupby(["model", "seed"], sort=False)[[*plan.columns]].first()
        for stage in ("start", "teacher")
    )
    for stage, found in (("start", starts), ("teacher", teachers)):
        models = list(found.dropna(how="all").groupby("model", sort=False))
        for model, of in models:
            name = stage if len(models) == 1 else _name_of(stage, Path(str(model)))
            cells = [spread(_once(of[key]), column.digits) for key, column in plan.columns.items()]
            lines.append(_row([f"*{name}*", *(word for cell in cells for word in (cell, "")), "", ""]))
    for group, heading in plan.groups.items():
        rows = []
        for name, of in table[table.group == group].groupby("variant", sort=False):
            after = of[of.stage == "after"].set_index(["start", "seed"])
            change = after[[*plan.columns]] - starts.reindex(after.index)
            cells = [f"`{name}`"]
            for key, column in plan.columns.items():
                cells += [spread(after[key], column.digits), spread(change[key], column.digits, sign=True)]
            cells += [_number(after.tokens.mean() / 1000), _number(after.seconds.median())]
            rows.append(_row(cells))
        if rows:
            lines += [f"| **{heading}** |" + " |" * (len(heads) + 2), *rows]
    return lines


def _name_of(stage: str, model: Path) -> str:
    """What a start or a teacher is called beside others: its run or folder."""
    name = model.parent.name if model.name == "export" else model.name
    return name if stage == "start" else f"{stage} {name}"


def _once(values: pandas.Series) -> pandas.Series:
    """One value where all seeds have the same: there is no deviation to tell."""
    known = values.dropna()
    return known[:1] if known.nunique() == 1 else known


def differences(plan: Plan, table: pandas.DataFrame) -> dict[str, pandas.DataFrame]:
    """By variant that is compared with another: how far it is from that one, a row a seed, with `warmup`."""
    after = {name: of.set_index("seed") for name, of in table[table.stage == "after"].groupby("variant", sort=False)}
    found = {}
    for one in plan.variants:
        other = one.against or plan.whole
        if one.name in after and other in after and other != one.name:
            mine, others = after[one.name], after[other].reindex(after[one.name].index)
            gaps = mine[[*plan.columns]] - others[[*plan.columns]]
            found[one.name] = gaps.dropna(how="all").assign(warmup=mine.warmup)
    return found


def paired_table(plan: Plan, table: pandas.DataFrame) -> list[str]:
    """What changes against another variant, seed by seed: mean and 95 % interval of the t distribution; ` *` where that
    leaves zero out."""
    own = {one.name: one.against for one in plan.variants if one.against}
    lines = []
    for name, of in differences(plan, table).items():
        cells = [paired(of[key].dropna(), column.digits) for key, column in plan.columns.items()]
        lines.append(_row([f"`{name}`" + (f" against `{own[name]}`" if name in own else ""), *cells]))
    head = _row(["" if own else f"against `{plan.whole}`", *(column.title for column in plan.columns.values())])
    return [head, "| --- |" + " ---: |" * len(plan.columns), *lines] if lines else []


def paired(gaps: pandas.Series, digits: int) -> str:
    """`mean [low, high] *`; one difference alone has no interval."""
    if len(gaps) < 2:
        return spread(gaps, digits, sign=True)
    low, high = student_t.interval(0.95, len(gaps) - 1, gaps.mean(), gaps.sem() or 1e-12)
    return f"{gaps.mean():+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]{' *' if low * high > 0 else ''}"


def page(plan: Plan, table: pandas.DataFrame, missing: Sequence[str]) -> str:
    """Markdown, complete in itself. `missing`: names of runs that are not finished."""
    known = [variant for variant in plan.variants if variant.name in set(table.variant)]
    seeds = sorted(set(table.seed))
    lines = [
        f"{len(table) // len(STAGES)} runs: {len(known)} variants, seeds {', '.join(map(str, seeds))}. Mean ± sample "
        "standard deviation over seeds; *change* is against the start of the same run.",
        "",
        *main_table(plan, table),
        "",
        *(f"{column.title}: {column.better} is better." for column in plan.columns.values()),
        "Tokens: in the responses that were learnt from. Seconds: the steps of one run, median.",
    ]
    if rows := paired_table(plan, table):
        how = " with its 95 % interval (t distribution); `*`: without zero." if len(seeds) > 1 else "."
        lines += ["", f"Differences, paired by seed: the mean{how}", "", *rows]
    lines += ["", "The variants:", "", *(f"- `{variant.name}`: {variant.what}." for variant in known)]
    if missing:
        lines += ["", f"Not finished, so not in the tables: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def draw(plan: Plan, table: pandas.DataFrame) -> bytes:
    """The PNG: of variants with rivals of their own how far they are from those, over the seconds of their warm-up;
    else each variant beside the others."""
    with rc_context(STYLE):
        figure = _curves(plan, table) if any(one.against for one in plan.variants) else _rows(plan, table)
        for axes, column in zip(figure.axes, plan.columns.values(), strict=True):
            axes.set_title(f"{column.title}\n{column.better} is better", fontsize=9, loc="left")
            axes.grid(color=GRID)
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=130)
    return out.getvalue()


def _curves(plan: Plan, table: pandas.DataFrame) -> Figure:
    """A panel for each column, a line through the means for each group, a dot for each seed."""
    gaps = differences(plan, table)
    figure = Figure(figsize=(3.1 * max(len(plan.columns), 2), 3.2), layout="constrained")
    panels = figure.subplots(1, len(plan.columns), squeeze=False)[0]
    for axes, key in zip(panels, plan.columns, strict=True):
        for (group, heading), (colour, shape) in zip(plan.groups.items(), MARKS, strict=False):
            of = pandas.concat(
                [
                    pandas.DataFrame(columns=["warmup", key]),
                    *(gaps[one.name] for one in plan.variants if one.group == group and one.name in gaps),
                ]
            )
            means = of.groupby("warmup")[key].mean()
            axes.plot(of.warmup, of[key], shape, color=colour, markersize=4, alpha=0.55, markeredgewidth=0)
            axes.plot(means.index, means, color=colour, linewidth=1.6, label=heading)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_xlabel("seconds of warm-up")
    panels[0].set_ylabel("difference to the rival")
    return figure


def _rows(plan: Plan, table: pandas.DataFrame) -> Figure:
    """A panel for each column, a row for each variant, a dot for each seed, a bar for the mean."""
    places: dict[str, Any] = {}
    place = 0.0
    for number, group in enumerate(plan.groups):
        names = table[table.group == group].variant.unique()
        places |= {name: (place + i, MARKS[number % len(MARKS)]) for i, name in enumerate(names)}
        place += len(names) + 0.6 * bool(len(names))
    figure = Figure(figsize=(2.6 * max(len(plan.columns), 2), 0.9 + 0.27 * (place + 1)), layout="constrained")
    panels = figure.subplots(1, len(plan.columns), sharey=True, squeeze=False)[0]
    for axes, key in zip(panels, plan.columns, strict=True):
        _panel(axes, key, places, table)
    panels[0].set_yticks([row for row, _ in places.values()], list(places), family="monospace")
    panels[0].set_ylim(place - 0.2, -0.8)
    return figure


def _panel(axes: Axes, key: str, places: dict[str, Any], table: pandas.DataFrame) -> None:
    """One column."""
    after = table[table.stage == "after"]
    for name, (row, (colour, shape)) in places.items():
        values = after[after.variant == name][key]
        axes.plot(values, [row] * len(values), shape, color=colour, markersize=4, alpha=0.55, markeredgewidth=0)
        axes.plot([values.mean()] * 2, [row - 0.32, row + 0.32], color=colour, linewidth=2.2)
    for stage, dashes in (("start", "--"), ("teacher", ":")):
        if math.isfinite(value := table[table.stage == stage][key].mean()):
            axes.axvline(value, color=INK, linestyle=dashes, linewidth=1.1, label=stage)
    axes.plot([], [], "o", color=INK, alpha=0.55, markersize=4, markeredgewidth=0, label="a seed")
    axes.plot([], [], "|", color=INK, markersize=9, markeredgewidth=2.2, label="mean")
    axes.xaxis.set_major_locator(MaxNLocator(5))
