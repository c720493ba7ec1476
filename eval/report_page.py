"""The HTML of a run's report: one file, no script, nothing loaded from elsewhere."""

from __future__ import annotations

import random
from html import escape
from pathlib import Path
from typing import Any

from eval.report_plots import Plot, smoothing_window
from eval.run_files import RunFiles

SHOWN_ANSWERS = 10
HEADLINES = (
    "reward-mean",
    "kl-teacher",
    "kl-reference",
    "length-mean",
    "length-finished-share",
    "loss-policy",
    "loss-pt",
    "grad-norm",
    "seconds",
)
"""Slugs of the charts that are shown first; the rest waits in a fold."""
STAGE_NAMES = {"before": "Student before", "after": "Student after", "teacher": "Teacher"}
MEASURE_NAMES = {"f1": "F1, %", "exact_match": "Exact match, %", "reverse_kl": "Reverse KL, nats a token"}
STYLE_FILE = Path(__file__).with_name("report.css")


def render_page(run: RunFiles, plots: list[Plot]) -> str:
    """The whole page."""
    parts = (_header(run), _scores(run), _pairs(run), _curves(run, plots), _answers(run), _config(run), _footer(run))
    body = "\n".join(part for part in parts if part)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(run.name)} - GRPO-KD</title>
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


def _header(run: RunFiles) -> str:
    """Name, status and how much was done."""
    summary = run.summary
    status = str(summary.get("status") or "unfinished")
    facts = [
        ("Algorithm", run.algo),
        ("Reward", run.reward),
        ("Steps", summary.get("steps") or (len(run.steps) or None)),
        ("Time", _duration((summary.get("seconds") or {}).get("total"))),
        ("Tokens sampled", _count((summary.get("tokens") or {}).get("sampled"))),
        ("Tokens scored", _count((summary.get("tokens") or {}).get("scored"))),
    ]
    items = "".join(f"<div><dt>{name}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts if value)
    return f"""<header>
<h1>{escape(run.name)} <span class="status">{escape(status)}</span></h1>
<dl class="facts">{items}</dl>
</header>"""


def _scores(run: RunFiles) -> str:
    """Student before, student after, teacher; and what the run changed."""
    stages = [stage for stage in STAGE_NAMES if run.scores[stage]]
    if not stages:
        return "<section><h2>Held-out questions</h2><p>No evaluation yet.</p></section>"
    head = "".join(f'<th scope="col">{name}</th>' for name in MEASURE_NAMES.values())
    rows = ""
    for stage in stages:
        scores = "".join(f"<td>{_score(measure, run.scores[stage].get(measure))}</td>" for measure in MEASURE_NAMES)
        rows += f'<tr><th scope="row">{STAGE_NAMES[stage]}</th>{scores}</tr>'
        if stage == "after" and run.scores["before"]:
            changes = "".join(f"<td>{_change(measure, run)}</td>" for measure in MEASURE_NAMES)
            rows += f'<tr class="change"><th scope="row">Change</th>{changes}</tr>'
    asked = f"{run.questions} questions" if run.questions else "Questions"
    source = f" of <code>{escape(run.data)}</code>" if run.data else ""
    missing = "" if run.scores["after"] else " The run has not been evaluated at its end yet."
    note = f"{asked}{source}, answered greedily; reverse KL of the student to the teacher on sampled answers.{missing}"
    return f"""<section>
<h2>Held-out questions</h2>
<table>
<thead><tr><td></td>{head}</tr></thead>
<tbody>{rows}</tbody>
</table>
<p class="note">{note}</p>
</section>"""


def _pairs(run: RunFiles) -> str:
    """Who knew right from wrong Faroese at the start; nothing where nobody was asked."""
    found = run.minimal_pairs
    if not found.get("pairs"):
        return ""
    names = ("Right sentence likelier, %", "95 %", "The same per character, %", "Bits a character", "Correlation")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    rows = ""
    for who in ("student", "teacher"):
        one = found[who]
        cells = (
            f"{100 * one['accuracy']:.1f}",
            f"{100 * one['low']:.1f} to {100 * one['high']:.1f}",
            f"{100 * one['accuracy_per_character']:.1f}",
            f"{one['bits_per_character']:.3f}",
            f"{one['correlation']:.3f}",
        )
        rows += f'<tr><th scope="row">{who.capitalize()}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
    note = (
        f"{found['pairs']} sentences of <code>{escape(str(found.get('text')))}</code> beside the same with one mistake "
        "each, before the first step. Correlation: of the log-probability of a character with right and wrong: what a "
        "reward made of that likelihood carries of grammar."
    )
    return f"""<section>
<h2>Right and wrong sentences</h2>
<table>
<thead><tr><td></td>{head}</tr></thead>
<tbody>{rows}</tbody>
</table>
<p class="note">{note}</p>
</section>"""


def _score(measure: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if measure == "reverse_kl" else f"{value:.1f}"


def _change(measure: str, run: RunFiles) -> str:
    """Points of F1 and exact match, percent of reverse KL."""
    before, after = run.scores["before"].get(measure), run.scores["after"].get(measure)
    if before is None or after is None:
        return "–"
    if measure != "reverse_kl":
        return _signed(after - before, 1)
    return _signed(100 * (after - before) / before, 0) + " %" if before > 0 else "–"


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _curves(run: RunFiles, plots: list[Plot]) -> str:
    """Small multiples, the telling ones first."""
    if not plots:
        return "<section><h2>Curves</h2><p>No step yet.</p></section>"
    by_slug = {plot.slug: plot for plot in plots}
    first = [by_slug[slug] for slug in HEADLINES if slug in by_slug] or plots[:6]
    more = [plot for plot in plots if plot not in first]
    window = smoothing_window(len(run.steps))
    note = f"Points are steps, lines the mean over {window} steps around." if window > 1 else "One point a step."
    fold = f"<details><summary>{len(more)} more curves</summary>{_grid(more)}</details>" if more else ""
    return f"""<section>
<h2>Curves</h2>
<p class="note">{note}</p>
{_grid(first)}
{fold}
</section>"""


def _grid(plots: list[Plot]) -> str:
    figures = "\n".join(
        f'<figure role="img" aria-label="{escape(plot.alt)}"><figcaption>{escape(plot.title)}</figcaption>'
        f"{plot.svg}</figure>"
        for plot in plots
    )
    return f'<div class="grid">{figures}</div>'


def _answers(run: RunFiles) -> str:
    """Ten questions, drawn with a fixed seed, so that nobody has picked them."""
    by_stage = {stage: {_key(row): row for row in rows} for stage, rows in run.answers.items()}
    stage = next((stage for stage in ("before", "after", "teacher") if run.answers[stage]), None)
    if stage is None:
        return ""
    rows = run.answers[stage]
    count = min(SHOWN_ANSWERS, len(rows))
    chosen = [rows[index] for index in sorted(random.Random(0).sample(range(len(rows)), count))]
    cards = "\n".join(_card(row, {stage: found.get(_key(row)) for stage, found in by_stage.items()}) for row in chosen)
    return f"""<section>
<h2>Answers before and after</h2>
<p class="note">{count} of {len(rows)} held-out questions, drawn at random. ✓ right, ◐ partly (its F1), ✗ wrong.</p>
<div class="cards">
{cards}
</div>
</section>"""


def _key(row: dict[str, Any]) -> str:
    """What makes a question the same in two evaluations."""
    return str(row["id"]) if row.get("id") is not None else f"{row.get('context') or ''}\n{row.get('question')}"


def _card(row: dict[str, Any], replies: dict[str, dict[str, Any] | None]) -> str:
    context = f'<blockquote lang="fo">{escape(row["context"])}</blockquote>' if row.get("context") else ""
    reference = " / ".join(map(str, row.get("answers") or [])) or "–"
    lines = "".join(
        f"<dt>{name}</dt><dd>{_reply(replies[stage])}</dd>" for stage, name in STAGE_NAMES.items() if replies.get(stage)
    )
    return f"""<article>
<h3 lang="fo">{escape(str(row.get("question", "")))}</h3>
{context}
<dl><dt>Reference</dt><dd lang="fo">{escape(reference)}</dd>{lines}</dl>
</article>"""


def _reply(row: dict[str, Any] | None) -> str:
    """An answer with its mark; the mark is a sign and a word, not only a colour."""
    if row is None:
        return "–"
    f1 = float(row.get("f1") or 0.0)
    if f1 >= 100.0 - 1e-6:
        mark = '<span class="right" title="right">✓<span class="hidden"> right</span></span>'
    elif f1 > 0:
        mark = f'<span class="partly" title="partly right">◐ {f1:.0f}<span class="hidden"> partly right</span></span>'
    else:
        mark = '<span class="wrong" title="wrong">✗<span class="hidden"> wrong</span></span>'
    text = str(row.get("prediction") or "")
    said = f'<span lang="fo">{escape(text)}</span>' if text.strip() else "<em>(empty)</em>"
    return f"{mark} {said}"


def _config(run: RunFiles) -> str:
    if not run.config:
        return ""
    return f"""<section>
<h2>Configuration</h2>
<details><summary>config.yaml</summary><pre>{escape(run.config)}</pre></details>
</section>"""


def _footer(run: RunFiles) -> str:
    phases = [(name, value) for name, value in (run.summary.get("seconds") or {}).items() if name != "total"]
    if not phases:
        return ""
    spent = ", ".join(f"{escape(name)} {_duration(value)}" for name, value in phases)
    return f'<footer class="note">Time by phase: {spent}.</footer>'


def _duration(seconds: float | None) -> str | None:
    """Seconds as a person says them."""
    if seconds is None:
        return None
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _count(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"
