"""The miniature's results as a table and a picture: each model beside the start and the teacher."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from matplotlib import rc_context
from matplotlib.figure import Figure

from eval.miniature_plan import Plan
from eval.report_plots import GRID, INK, PALETTE, STYLE
from rewards.minimal_pairs import behind_first_word, difference_interval, wins_of

Measured = Mapping[str, Any]


def bits_interval(found: Measured, start: Measured) -> tuple[float, float]:
    """95 % interval of the difference in bits a character to the start, over the same sentences (paired, ratio of sums,
    normal approximation)."""
    characters = [len(behind_first_word(sentence)) for sentence in found["sentences"]]
    bits = [(s - f) / math.log(2) for f, s in zip(found["right"], start["right"], strict=True)]
    mean = sum(bits) / sum(characters)
    count = len(bits)
    spread = math.sqrt(
        sum((b - mean * c) ** 2 for b, c in zip(bits, characters, strict=True)) * count / max(count - 1, 1)
    )
    radius = 1.959964 * spread / sum(characters)
    return mean - radius, mean + radius


def order(plan: Plan, measured: Mapping[str, Measured]) -> list[str]:
    """Start, arms as in the plan, teacher."""
    return ["start", *(arm.name for arm in plan.arms if arm.name in measured), "teacher"]


def table(plan: Plan, measured: Mapping[str, Measured], runs: Path) -> str:
    """Markdown."""
    start = measured["start"]
    lines = [
        f"{start['pairs']} held-out sentences; differences to the start with 95 % intervals over the same sentences.",
        "",
        "| model | bits a character | difference | minimal pairs (%) | difference | per char (%) | trained on "
        "(text + sampled tokens) | reverse KL | minutes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in order(plan, measured):
        found = measured[name]
        cells = [name, f"{found['bits_per_character']:.3f}", "", f"{100 * found['accuracy']:.1f}", ""]
        if name != "start":
            cells[2] = "{:+.3f} to {:+.3f}".format(*bits_interval(found, start))
            wins = [wins_of(one["right"], one["wrong"]) for one in (found, start)]
            low, high = difference_interval(wins[0], wins[1])
            cells[4] = f"{100 * low:+.1f} to {100 * high:+.1f}"
        cells += [f"{100 * found['accuracy_per_character']:.1f}", *_training(runs / name)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _training(run: Path) -> list[str]:
    """Tokens, reverse KL to the teacher before and after (nats a token of the student) and minutes of an arm."""
    path = run / "summary.json"
    if not path.is_file():
        return ["", "", ""]
    summary = json.loads(path.read_text(encoding="utf-8"))
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    sampled = summary.get("tokens", {}).get("sampled")
    batch = config["sft"]["batch"] if sampled is None else config["loss"]["pt_batch"] * (config["loss"]["pt_coef"] > 0)
    tokens = f"{summary['steps'] * batch * config['data']['text_block_tokens']:,}"
    tokens += "" if sampled is None else f" + {sampled:,}"
    kl = [summary[key]["reverse_kl"] for key in ("eval_before", "eval_after") if key in summary]
    spent = run / "minutes.json"
    minutes = f"{json.loads(spent.read_text(encoding='utf-8'))['minutes']:.1f}" if spent.is_file() else ""
    return [tokens, " to ".join(f"{value:.2f}" for value in kl), minutes]


def draw(plan: Plan, measured: Mapping[str, Measured]) -> bytes:
    """The PNG: bits a character and minimal-pair accuracy of each model, the start's value as a line."""
    names = order(plan, measured)
    panels = (
        ("bits_per_character", 1.0, "Bits a character, held-out text\nlower is better"),
        ("accuracy", 100.0, "Minimal pairs (%), with 95 % interval\nhigher is better"),
    )
    with rc_context(STYLE):
        figure = Figure(figsize=(8.0, 0.9 + 0.32 * len(names)), layout="constrained")
        for axes, (key, factor, title) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
            _dots(axes, [factor * measured[name][key] for name in names])
            if key == "accuracy":
                for row, name in enumerate(names):
                    axes.plot([100 * measured[name][end] for end in ("low", "high")], [row, row], color=PALETTE[0])
            axes.set_yticks(range(len(names)), names, family="monospace")
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.set_title(title, fontsize=9, loc="left")
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=130)
    return out.getvalue()


def _dots(axes: Any, values: Sequence[float]) -> None:
    axes.plot(values, range(len(values)), "o", color=PALETTE[0], markersize=5)
    axes.axvline(values[0], color=INK, linestyle="--", linewidth=1)
    axes.grid(axis="both", color=GRID)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
