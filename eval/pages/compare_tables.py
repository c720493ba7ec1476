"""The comparison as one Markdown table and as LaTeX tables (booktabs)."""

from __future__ import annotations

from eval.pages.compare_scores import GROUPS, measure
from eval.pages.comparison import Cell, Comparison
from eval.pages.page_parts import ranged, signed

READING = (
    "Square brackets: 95 % interval by bootstrap over examples (EuroEval's own, over its iterations, for its scores). "
    "Changes: difference to the baseline, for a student its own start, on the same examples, paired; bold where its "
    "interval does not contain 0. Letters mark numbers that may not be compared with the baseline or with published "
    "figures."
)
_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "−": "$-$", "–": "--", "≤": r"$\leq$",
    }
)  # fmt: skip


def markdown(comparison: Comparison, title: str) -> str:
    """One table: a row for each model, and under it one for its changes."""
    keys = [key for _, keys, _ in comparison.groups() for key in keys]
    lines = [f"# {title}", ""]
    if not keys:
        return "\n".join([*lines, "No evaluation yet.", ""])
    lines += [_row(["", *map(_head, keys)]), _row(["---", *("---:" for _ in keys)])]
    for one in comparison.entrants:
        cells = [(comparison.cell(one, key), measure(key).digits) for key in keys]
        values = [_value(cell, digits) for cell, digits in cells]
        marks = [f" <sup>{', '.join(cell.marks)}</sup>" if cell and cell.marks else "" for cell, _ in cells]
        lines.append(_row([one.name, *(value + mark for value, mark in zip(values, marks, strict=True))]))
        changes = [_change(cell, digits) for cell, digits in cells]
        if any(changes):
            bold = [
                f"**{text}**" if cell and cell.clear else text for text, (cell, _) in zip(changes, cells, strict=True)
            ]
            lines.append(_row([f"*{one.name}, change*", *bold]))
    baselines = ", ".join(comparison.baselines)
    lines += ["", READING, "", *([f"Baseline: {baselines}."] if baselines else []), ""]
    lines += [f"- <sup>{letter}</sup> {text}" for letter, text in comparison.notes.items()]
    return "\n".join(lines).rstrip() + "\n"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _head(key: str) -> str:
    found = measure(key)
    return f"{GROUPS.get(found.group, found.group)}: {found.name}" if found.group != "euroeval" else found.name


def _value(cell: Cell | None, digits: int) -> str:
    return "–" if cell is None else ranged(cell.score, digits)


def _change(cell: Cell | None, digits: int) -> str:
    return "" if cell is None or cell.change is None else ranged(cell.change, digits, signed)


def tex(text: str) -> str:
    """Plain text for LaTeX."""
    return text.translate(_LATEX)


def latex(comparison: Comparison) -> str:
    r"""A `table` for each group. Needs \usepackage{booktabs}."""
    parts = [r"% \usepackage{booktabs}"]
    for group, keys, rows in comparison.groups():
        body, letters = [], set()
        for one in rows:
            cells = [(comparison.cell(one, key), measure(key).digits) for key in keys]
            marks = [cell.marks if cell else () for cell, _ in cells]
            letters |= {mark for found in marks for mark in found}
            raised = [rf"\textsuperscript{{{','.join(found)}}}" if found else "" for found in marks]
            values = [tex(_value(cell, digits)) + mark for (cell, digits), mark in zip(cells, raised, strict=True)]
            body.append(_latex_row(tex(one.name), values))
            changes = [tex(_change(cell, digits)) for cell, digits in cells]
            if any(changes):
                bold = [rf"\textbf{{{t}}}" if c and c.clear else t for t, (c, _) in zip(changes, cells, strict=True)]
                body.append(_latex_row(r"\quad\emph{change}", bold))
        notes = [
            rf" \textsuperscript{{{one}}}~{tex(text)}." for one, text in comparison.notes.items() if one in letters
        ]
        caption = tex(f"{GROUPS.get(group, group)}. {READING}") + "".join(notes)
        head = _latex_row("", [tex(measure(key).name) for key in keys])
        lines = [
            r"\begin{table}", r"\centering\small", rf"\caption{{{caption}}}", rf"\label{{tab:{group}}}",
            rf"\begin{{tabular}}{{l{'r' * len(keys)}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule",
            r"\end{tabular}", r"\end{table}",
        ]  # fmt: skip
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _latex_row(head: str, cells: list[str]) -> str:
    return f"{' & '.join([head, *cells])} \\\\"
