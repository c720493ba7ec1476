"""The HTML of a run's report: one file, no script, nothing loaded from elsewhere."""

from __future__ import annotations

from html import escape

from eval.page_parts import answer_card, answer_key, answer_section, chart_grid, drawn, page, signed, table_region
from eval.report_plots import Plot, smoothing_window
from eval.run_files import RunFiles

SHOWN_ANSWERS = 10
HEADLINES = (
    "reward-mean",
    "validation-f1",
    "validation-reverse-kl",
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


def render_page(run: RunFiles, plots: list[Plot]) -> str:
    """The whole page."""
    parts = (_header(run), _scores(run), _pairs(run), _curves(run, plots), _answers(run), _config(run), _footer(run))
    return page(run.name, parts)


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
    table = f"""<table>
<thead><tr><td></td>{head}</tr></thead>
<tbody>{rows}</tbody>
</table>"""
    return f"""<section>
<h2>Held-out questions</h2>
{table_region("Held-out questions", table)}
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
    table = f"""<table>
<thead><tr><td></td>{head}</tr></thead>
<tbody>{rows}</tbody>
</table>"""
    return f"""<section>
<h2>Right and wrong sentences</h2>
{table_region("Right and wrong sentences", table)}
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
        return signed(after - before, 1)
    return signed(100 * (after - before) / before, 0) + " %" if before > 0 else "–"


def _curves(run: RunFiles, plots: list[Plot]) -> str:
    """Small multiples, the telling ones first."""
    if not plots:
        return "<section><h2>Curves</h2><p>No step yet.</p></section>"
    by_slug = {plot.slug: plot for plot in plots}
    first = [by_slug[slug] for slug in HEADLINES if slug in by_slug] or plots[:6]
    more = [plot for plot in plots if plot not in first]
    window = smoothing_window(len(run.steps))
    note = f"Points are steps, lines the mean over {window} steps around." if window > 1 else "One point a step."
    fold = f"<details><summary>{len(more)} more curves</summary>{chart_grid(more)}</details>" if more else ""
    return f"""<section>
<h2>Curves</h2>
<p class="note">{note}</p>
{chart_grid(first)}
{fold}
</section>"""


def _answers(run: RunFiles) -> str:
    """Ten questions, drawn with a fixed seed, so that nobody has picked them."""
    by_stage = {stage: {answer_key(row): row for row in rows} for stage, rows in run.answers.items()}
    stage = next((stage for stage in STAGE_NAMES if run.answers[stage]), None)
    if stage is None:
        return ""
    rows = run.answers[stage]
    chosen = drawn(rows, SHOWN_ANSWERS)
    cards = [
        answer_card(row, {name: by_stage[stage].get(answer_key(row)) for stage, name in STAGE_NAMES.items()})
        for row in chosen
    ]
    return answer_section("Answers before and after", cards, len(rows))


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
