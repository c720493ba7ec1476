"""What the pages of this folder share: the frame, charts in a grid, cards with answers."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from eval.report_plots import Plot

STYLE_FILE = Path(__file__).with_name("report.css")


def page(title: str, parts: Sequence[str]) -> str:
    """One file, no script, nothing loaded from elsewhere. `title` is plain text, `parts` are HTML; empty ones fall."""
    body = "\n".join(part for part in parts if part)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)} - GRPO-KD</title>
<style>
{STYLE_FILE.read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def chart_grid(plots: Sequence[Plot]) -> str:
    """Small multiples."""
    figures = "\n".join(
        f'<figure role="img" aria-label="{escape(plot.alt)}"><figcaption>{escape(plot.title)}</figcaption>'
        f"{plot.svg}</figure>"
        for plot in plots
    )
    return f'<div class="grid">{figures}</div>'


def table_region(name: str, table: str) -> str:
    """A table (HTML) that scrolls by itself where the screen is too narrow for it. `name` is plain text."""
    return f'<div class="scroll" role="region" aria-label="{escape(name)}, table" tabindex="0">\n{table}\n</div>'


def signed(value: float, digits: int) -> str:
    """With a sign, and a minus that is one; a zero is not below zero."""
    return f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", "−")


def drawn(rows: Sequence[Any], count: int) -> list[Any]:
    """So many rows, in order, drawn with a fixed seed: nobody has picked them."""
    return [rows[index] for index in sorted(random.Random(0).sample(range(len(rows)), min(count, len(rows))))]


def answer_key(row: Mapping[str, Any]) -> str:
    """What makes a question the same in two evaluations."""
    return str(row["id"]) if row.get("id") is not None else f"{row.get('context') or ''}\n{row.get('question')}"


def answer_card(row: Mapping[str, Any], replies: Mapping[str, Mapping[str, Any] | None]) -> str:
    """A question with its accepted answers and what each model (by name) said; None: was not asked."""
    context = f'<blockquote lang="fo">{escape(row["context"])}</blockquote>' if row.get("context") else ""
    reference = " / ".join(map(str, row.get("answers") or [])) or "–"
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{_reply(said)}</dd>" for name, said in replies.items() if said)
    return f"""<article>
<h3 lang="fo">{escape(str(row.get("question", "")))}</h3>
{context}
<dl><dt>Reference</dt><dd lang="fo">{escape(reference)}</dd>{lines}</dl>
</article>"""


def answer_section(title: str, cards: Sequence[str], questions: int) -> str:
    """Those cards, drawn from so many questions."""
    shown = "\n".join(cards)
    return f"""<section>
<h2>{escape(title)}</h2>
<p class="note">{len(cards)} of {questions} held-out questions, drawn at random. ✓ right, ◐ partly (F1), ✗ wrong.</p>
<div class="cards">
{shown}
</div>
</section>"""


def _reply(row: Mapping[str, Any]) -> str:
    """An answer with its mark; the mark is a sign and a word, not only a colour."""
    f1 = float(row.get("f1") or 0.0)
    if f1 >= 100.0 - 1e-6:
        mark = '<span class="right" title="right">✓<span class="hidden"> right</span></span>'
    elif f1 > 0:
        mark = f'<span class="partly" title="partly right">◐ {f1:.0f}<span class="hidden"> partly right</span></span>'
    else:
        mark = '<span class="wrong" title="wrong">✗<span class="hidden"> wrong</span></span>'
    return f"{mark} {written(row.get('prediction'))}"


def written(text: object) -> str:
    """What a model wrote."""
    return f'<span lang="fo">{escape(str(text))}</span>' if str(text or "").strip() else "<em>(empty)</em>"
