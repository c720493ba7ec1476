"""One table of a run and what it is to be measured against: student before, after each stage, teacher, published.

    python eval/compare.py                              # the newest run
    python eval/compare.py --run runs/A runs/B --model DIR

Reads the evaluations that lie in the runs' folders (held-out questions, EuroEval, bits a byte, minimal pairs,
translation) and measures nothing itself. Writes compare.md, compare.html, compare.tex and plots/compare-*.png into
the first run's folder, or into --out, and curves.html and plots/curves-*.png, which lay the runs' curves over each
other. It may be called while runs go on. docs/comparing.md says how to read them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if not __package__:  # started as a script: our folders first, and no file of this folder hides a library
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from configs.io.files import write_atomically
from eval.cli import exit_code, parser_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line that says what to mend."""
    parser = parser_of(__doc__)
    parser.add_argument("--run", type=Path, nargs="+", help="folders of runs (default: the newest one)")
    parser.add_argument("--model", nargs="+", default=[], help="other models that were evaluated: directories, hub ids")
    parser.add_argument("--out", type=Path, help="folder of the output (default: the first run's)")
    parser.add_argument("--no_published", action="store_true", help="without the figures of eval/pages/published.yaml")
    options = parser.parse_args(arguments)
    return exit_code(lambda: write_all(options))


def write_all(options: argparse.Namespace) -> None:
    """Tables, pages and plots. Raises ValueError where something is to be mended."""
    # Imported late: a mistake in the arguments is answered at once, not after seconds of importing matplotlib.
    from eval.measures.model import newest_run
    from eval.pages.compare_models import entrants_of, published, with_own_names
    from eval.pages.compare_page import render_comparison, render_curves
    from eval.pages.compare_plots import draw_comparison
    from eval.pages.compare_tables import latex, markdown
    from eval.pages.comparison import compare
    from eval.pages.page_parts import visible
    from eval.pages.report_plots import draw_curves
    from eval.pages.run_files import read_run

    runs = [_run(run, options.runs_dir) for run in options.run or [newest_run(options.runs_dir)]]
    entrants = entrants_of(runs, options.model, options.runs_dir)
    known = {key for one in entrants for key in one.scores}
    if not options.no_published:  # a published figure says something beside one of ours only
        entrants = with_own_names([*entrants, *(one for one in published() if known & one.scores.keys())])
    comparison = compare(entrants)
    files = [read_run(run) for run in runs]
    names = [file.name for file in files]
    for place, run in enumerate(runs):
        if names.count(names[place]) > 1:
            files[place] = replace(files[place], name=f"{run.resolve().parent.name}/{names[place]}")
    out = options.out or runs[0]
    title = f"Comparison: {', '.join(run.resolve().name for run in runs)}"
    table = visible(markdown(comparison, title))
    plots = draw_comparison(comparison)
    write_atomically(out / "compare.md", table)
    write_atomically(out / "compare.tex", visible(latex(comparison)))
    for plot in (plot for group in plots.values() for plot in group):
        write_atomically(out / "plots" / f"compare-{plot.slug}.png", plot.png)
    write_atomically(out / "compare.html", render_comparison(comparison, plots, title))
    curves = draw_curves({run.name: (run.steps, run.metrics) for run in files})
    for plot in curves:
        write_atomically(out / "plots" / f"curves-{plot.slug}.png", plot.png)
    write_atomically(out / "curves.html", render_curves(files, curves, title.replace("Comparison", "Curves", 1)))
    print(table)
    charts = sum(map(len, plots.values())) + len(curves)
    print(f"written: {out / 'compare.html'}, curves.html, compare.md, compare.tex and {charts} PNG in plots/")


def _run(given: Path, runs_dir: Path) -> Path:
    """A run by its folder or by its name. Raises ValueError."""
    for folder in (given, runs_dir / given):
        if (folder / "config.yaml").is_file():
            return folder
    raise ValueError(f"--run {given}: no config.yaml in it; give the folder of a run (runs/NAME)")


if __name__ == "__main__":
    sys.exit(main())
