"""One page that shows a run: tables, curves, answers before and after.

    python eval/report.py --run runs/NAME

Reads only the run's folder and writes report.html there (self-contained: nothing is loaded from anywhere), with each
plot as plots/NAME.png. An unfinished run gives a page of what there is so far.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a script: our folders first, and no file of this folder hides a library
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from configs.io.files import write_atomically
from eval.cli import exit_code, parser_of
from eval.pages.report_page import render_page
from eval.pages.report_plots import draw_plots
from eval.pages.run_files import read_run


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line that says what to mend."""
    parser = parser_of(__doc__, runs_dir=False)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run, such as runs/grpo-minillm")
    folder = parser.parse_args(arguments).run
    return exit_code(lambda: write_report(folder))


def write_report(run_dir: Path) -> None:
    """The page and its plots. Raises ValueError where it is not the folder of a run."""
    run = read_run(run_dir)
    plots = draw_plots(run.steps, run.metrics)
    for plot in plots:
        write_atomically(run_dir / "plots" / f"{plot.slug}.png", plot.png)
    write_atomically(run_dir / "report.html", render_page(run, plots))
    print(f"report: {run_dir / 'report.html'} ({len(plots)} plots)")


if __name__ == "__main__":
    sys.exit(main())
