"""The comparison as one Markdown table and as LaTeX tables (booktabs)."""

from __future__ import annotations

from collections.abc import Callable

from eval.bootstrap import Interval
from eval.compare_models import Entrant
from eval.compare_scores import GROUPS, measure
from eval.comparison import Cell, Comparison
from eval.page_parts import signed

READING = (
    "Square brackets: 95 % interval by bootstrap over examples (EuroEval's own, over its iterations, for its scores). "
    "Changes: difference to the baseline on the same examples, paired; bold where its interval does not hold 0. "
    "Letters mark numbers that may not be compared with the baseline or with published figures."
)


def number(value: float, digits: int) -> str:
    """With a minus that is one, and none before a zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def ranged(found: Interval, digits: int, show: Callable[[float, int], str] = number) -> str:
    """`23.5 [18.2, 29.0]`."""
    return f"{show(found.value, digits)} {bounds(found, digits, show)}"


def bounds(found: Interval, digits: int, show: Callable[[float, int], str] = number) -> str:
    """`[18.2, 29.0]`."""
    return f"[{show(found.low, digits)}, {show(found.high, digits)}]"


def markdown(comparison: Comparison, title: str) -> str:
    """One table: a row for each model, and under it one for its changes."""
    groups = comparison.groups()
    keys = [key for _, keys, _ in groups for key in keys]
    lines = [f"# {title}", ""]
    if not keys:
        return "\n".join([*lines, "No evaluation yet.", ""])
    lines += [_row(["", *(_head(key) for key in keys)]), _row(["---", *("---:" for _ in keys)])]
    for one in comparison.entrants:
        cells = [comparison.cell(one, key) for key in keys]
        lines.append(_row([one.name, *(_markdown_value(cell, key) for cell, key in zip(cells, keys, strict=True))]))
        if any(cell is not None and cell.change is not None for cell in cells):
            changes = [_markdown_change(cell, key) for cell, key in zip(cells, keys, strict=True)]
            lines.append(_row([f"*{one.name}, change*", *changes]))
    lines += ["", READING, "", *_baseline_lines(comparison), ""]
    lines += [f"- <sup>{letter}</sup> {text}" for letter, text in comparison.notes.items()]
    return "\n".join(lines).rstrip() + "\n"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _head(key: str) -> str:
    found = measure(key)
    return f"{GROUPS.get(found.group, found.group)}: {found.name}" if found.group != "euroeval" else found.name


def _markdown_value(cell: Cell | None, key: str) -> str:
    if cell is None:
        return "–"
    digits = measure(key).digits
    found = cell.score.interval
    text = ranged(found, digits) if found is not None else number(cell.score.value, digits)
    return text + (f" <sup>{', '.join(cell.marks)}</sup>" if cell.marks else "")


def _markdown_change(cell: Cell | None, key: str) -> str:
    if cell is None or cell.change is None:
        return ""
    text = ranged(cell.change, measure(key).digits, signed)
    return f"**{text}**" if cell.clear else text


def _baseline_lines(comparison: Comparison) -> list[str]:
    names = sorted(set(comparison.baselines.values()), key=list(comparison.baselines.values()).index)
    return [f"Baseline: {', '.join(names)}."] if names else []


_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "−": "$-$", "–": "--", "≤": r"$\leq$",
    }
)  # fmt: skip


def tex(text: str) -> str:
    """Plain text for LaTeX."""
    return text.translate(_LATEX)


def latex(comparison: Comparison) -> str:
    r"""A `table` for each group. Needs \usepackage{booktabs}."""
    parts = [r"% \usepackage{booktabs}"]
    for group, keys, rows in comparison.groups():
        body = []
        for one in rows:
            body.append(_latex_row(tex(one.name), [_latex_value(comparison.cell(one, key), key) for key in keys]))
            changes = [_latex_change(comparison.cell(one, key), key) for key in keys]
            if any(changes):
                body.append(_latex_row(r"\quad\emph{change}", changes))
        letters = {mark for one in rows for key in keys if (c := comparison.cell(one, key)) for mark in c.marks}
        notes = " ".join(
            rf"\textsuperscript{{{letter}}}~{tex(text)}."
            for letter, text in comparison.notes.items()
            if letter in letters
        )
        caption = tex(f"{GROUPS.get(group, group)}. {READING}") + (f" {notes}" if notes else "")
        parts.append(
            "\n".join(
                [
                    r"\begin{table}",
                    r"\centering\small",
                    rf"\caption{{{caption}}}",
                    rf"\label{{tab:{group}}}",
                    rf"\begin{{tabular}}{{l{'r' * len(keys)}}}",
                    r"\toprule",
                    _latex_row("", [tex(measure(key).name) for key in keys]),
                    r"\midrule",
                    *body,
                    r"\bottomrule",
                    r"\end{tabular}",
                    r"\end{table}",
                ]
            )
        )
    return "\n\n".join(parts) + "\n"


def _latex_row(head: str, cells: list[str]) -> str:
    return f"{' & '.join([head, *cells])} \\\\"


def _latex_value(cell: Cell | None, key: str) -> str:
    if cell is None:
        return "--"
    digits, found = measure(key).digits, cell.score.interval
    text = tex(ranged(found, digits) if found is not None else number(cell.score.value, digits))
    return text + (rf"\textsuperscript{{{','.join(cell.marks)}}}" if cell.marks else "")


def _latex_change(cell: Cell | None, key: str) -> str:
    if cell is None or cell.change is None:
        return ""
    text = tex(ranged(cell.change, measure(key).digits, signed))
    return rf"\textbf{{{text}}}" if cell.clear else text


def answered(comparison: Comparison) -> list[Entrant]:
    """Rows whose held-out answers are known."""
    return [one for one in comparison.entrants if one.answers]
