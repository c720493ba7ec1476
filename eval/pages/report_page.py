"""The HTML of a run's report (templates/report.html.j2)."""

from __future__ import annotations

import math
from datetime import timedelta

from configs.io.results import HELDOUT
from eval.pages.page_parts import answer_cards, render, signed
from eval.pages.report_plots import MOST, Plot, smoothing_window
from eval.pages.run_files import RunFiles

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
STAGE_NAMES = {"before": "Student before", "after": "Student after", "baseline": "Baseline", "teacher": "Teacher"}


def render_page(run: RunFiles, plots: list[Plot]) -> str:
    """The whole page."""
    seconds, tokens = run.summary.get("seconds") or {}, run.summary.get("tokens") or {}
    facts = [
        ("Algorithm", run.settings.get("algo")),
        ("Reward", run.settings.get("reward")),
        ("Steps", run.summary.get("steps") or (len(run.steps) or None)),
        ("Time", _duration(seconds.get("total"))),
        ("Tokens sampled", _count(tokens.get("sampled"))),
        ("Tokens scored", _count(tokens.get("scored"))),
    ]
    by_slug = {plot.slug: plot for plot in plots}
    first = [by_slug[slug] for slug in HEADLINES if slug in by_slug] or plots[:6]
    answers = {name: run.evaluations[key].rows for key, name in STAGE_NAMES.items() if key in run.evaluations}
    asked = next((rows for rows in answers.values() if rows), ())
    return render(
        "report.html.j2",
        run.name,
        run=run,
        facts=facts,
        measures=[HELDOUT[key][0] for key in _measured(run)],
        scores=_scores(run),
        plots=first,
        more=[plot for plot in plots if plot not in first],
        points="steps" if len(run.steps) <= MOST else f"lowest and highest of each {2 * len(run.steps) // MOST} steps",
        window=smoothing_window(len(run.steps)),
        cards=answer_cards(asked, answers),
        data=next((one.data for one in run.evaluations.values()), {}),
        asked=len(asked),
        phases=[(name, _duration(value)) for name, value in seconds.items() if name != "total"],
    )


def _measured(run: RunFiles) -> list[str]:
    """Keys of what was measured: open questions are not asked in every run."""
    found = {key for one in run.evaluations.values() for key in one.numbers}
    return [key for key in HELDOUT if key in found]


def _scores(run: RunFiles) -> list[tuple[str, list[str]]]:
    """Student before, student after, what the run changed, a baseline, teacher; those that are known."""
    measures = _measured(run)
    known = {
        stage: {key: value for key, value in one.numbers.items() if key in HELDOUT and math.isfinite(value)}
        for stage, one in run.evaluations.items()
    }
    rows = []
    for stage, name in STAGE_NAMES.items():
        if scores := known.get(stage):
            rows.append((name, [_score(measure, scores.get(measure)) for measure in measures]))
            if stage == "after" and (before := known.get("before")):
                rows.append(("Change", [_change(key, before.get(key), scores.get(key)) for key in measures]))
    return rows


def _score(measure: str, value: float | None) -> str:
    return "–" if value is None else f"{value:.{HELDOUT[measure][2]}f}"


def _change(measure: str, before: float | None, after: float | None) -> str:
    """Points of F1 and exact match, percent of reverse KL."""
    if before is None or after is None:
        return "–"
    if not measure.endswith("kl"):
        return signed(after - before, 1)
    return signed(100 * (after - before) / before, 0) + " %" if before > 0 else "–"


def _duration(seconds: float | None) -> str | None:
    """Hours, minutes and seconds."""
    return None if seconds is None else str(timedelta(seconds=round(seconds)))


def _count(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"
