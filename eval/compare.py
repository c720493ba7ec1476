"""One table of a run and what it is to be measured against: student before, after each stage, teacher, published.

    python eval/compare.py                              # the newest run
    python eval/compare.py --run runs/A runs/B --model DIR

Reads the evaluations that lie in the runs' folders (held-out questions, EuroEval, bits a byte, minimal pairs,
translation) and measures nothing itself. Writes compare.md, compare.html, compare.tex and compare-*.png into the first
run's folder, or into --out. docs/comparing.md says how to read them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a script: our rooms first, and no file of this folder hides a library
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from configs.files import write_atomically
from configs.schema import RunConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line that says what to mend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--run", type=Path, nargs="+", help="folders of runs (default: the newest one)")
    parser.add_argument("--model", nargs="+", default=[], help="other models that were evaluated: directories, hub ids")
    parser.add_argument("--runs_dir", type=Path, default=Path(RunConfig().runs_dir), help="folder of all runs")
    parser.add_argument("--out", type=Path, help="folder of the output (default: the first run's)")
    parser.add_argument("--no_published", action="store_true", help="without the figures of eval/published.yaml")
    options = parser.parse_args(arguments)

    # Imported late: a mistake in the arguments is answered at once, not after seconds of importing matplotlib.
    from eval.compare_models import entrants_of, published
    from eval.compare_page import render_comparison
    from eval.compare_plots import draw_comparison
    from eval.compare_tables import latex, markdown
    from eval.comparison import compare
    from eval.model_dirs import newest_run

    try:
        runs = options.run or [newest_run(options.runs_dir)]
        runs = [_run(run, options.runs_dir) for run in runs]
        entrants = entrants_of(runs, options.model, options.runs_dir)
        known = {key for one in entrants for key in one.scores}
        if not options.no_published:  # a published figure says something beside one of ours only
            entrants += [one for one in published() if known & one.scores.keys()]
        comparison = compare(entrants)
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    out = options.out or runs[0]
    title = f"Comparison: {', '.join(run.resolve().name for run in runs)}"
    table = markdown(comparison, title)
    plots = draw_comparison(comparison)
    write_atomically(out / "compare.md", table)
    write_atomically(out / "compare.tex", latex(comparison))
    for plot in (plot for group in plots.values() for plot in group):
        write_atomically(out / f"compare-{plot.slug}.png", plot.png)
    write_atomically(out / "compare.html", render_comparison(comparison, plots, title))
    print(table)
    print(f"written: {out / 'compare.html'}, compare.md, compare.tex and {sum(map(len, plots.values()))} PNG beside it")
    return 0


def _run(given: Path, runs_dir: Path) -> Path:
    """A run by its folder or by its name. Raises ValueError."""
    for folder in (given, runs_dir / given):
        if (folder / "config.yaml").is_file():
            return folder
    raise ValueError(f"--run {given}: no config.yaml in it; give the folder of a run (runs/NAME)")


if __name__ == "__main__":
    sys.exit(main())
