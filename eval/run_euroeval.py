"""Stage 3: EuroEval's Faroese tasks, and the run's own held-out questions.

    python eval/run_euroeval.py                                     # the newest run's export
    python eval/run_euroeval.py --model runs/a/export DIR ORG/NAME  # several models, same tasks
    python eval/run_euroeval.py --iterations 2 --tasks foqa fosent  # a quicker look
    python eval/run_euroeval.py --data DIR                          # local splits (format: eval/euroeval/data.py)

The real `euroeval` package makes prompts, examples, bootstrap samples, labels and scores; the generation is ours, in
this process, on CPU or CUDA. A model of the embedded demo is measured on the demo's own splits, any other on the hub's
data where the hub answers within 5 s. Results: runs/NAME/eval/euroeval.json, for a model outside of any run
RUNS_DIR/models/NAME-HASH/eval/euroeval.json (eval/euroeval/run.py has the format). What is finished is kept: run the
same command again to continue. Needs the extra: pip install -c constraints.txt 'euroeval>=16.11,<17'.
docs/evaluation.md says when the figures may be compared.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if not __package__:  # started as a script: the repository first, and no file of this folder hides a library
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from eval import heldout
from eval.cli import exit_code, parser_of
from eval.euroeval.data import DEMO_SPLITS, check_splits, is_demo, probe_hub
from eval.euroeval.run import RESULT, Settings, evaluate
from eval.measure import add_options, read_options, table
from eval.measures.model import Model, check_model, newest_export, output_folder, run_config, run_of

INSTALL = "EuroEval is not installed; pip install -c constraints.txt 'euroeval>=16.11,<17'"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line that says what to mend."""
    parser = parser_of(__doc__)
    parser.add_argument("--model", nargs="+", help="directories or hub ids (default: the newest run's export)")
    add_options(parser, Settings)
    args = parser.parse_args(arguments)
    return exit_code(lambda: ask(args.model, read_options(args, Settings), args.runs_dir))


def ask(models: Sequence[str] | None, settings: Settings, runs_dir: Path) -> None:
    """Every model the tasks, and the run's own held-out questions first. Raises ValueError where something is to be
    mended, in models and data before anything heavy is imported."""
    # As the user calls them, which says where results go: those of a hub id not by its place in the hub's cache.
    models = models or [str(newest_export(runs_dir))]
    for model in models:
        check_model(model)
    if settings.data is None and not settings.hub:
        settings = replace(settings, data=next(filter(None, map(_demo_splits, models)), None))
    if settings.data is not None:
        check_splits(settings.data, settings.tasks)
    unreachable = probe_hub(settings.tasks) if settings.data is None else None
    if not settings.no_heldout and (own := [model for model in models if run_of(model)]):
        heldout.ask(own, None, runs_dir)
    if importlib.util.find_spec("euroeval") is None:
        raise ValueError(INSTALL)
    if unreachable:  # the held-out questions could be asked all the same
        raise ValueError(f"no data: the hub does not answer ({unreachable}); give --data DIR with local splits")
    import torch

    dtype = settings.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    results = [evaluate(Model(path=model, dtype=dtype, runs_dir=runs_dir), settings) for model in models]
    print(table(results))
    whys = dict.fromkeys(f"  {row['task']}: {row['why_not']}" for one in results for row in one.rows if row["why_not"])
    if whys:
        print("not comparable with EuroEval's leaderboard:", *whys, sep="\n")
    for model in models:
        print(f"written: {os.path.relpath(output_folder(model, runs_dir))}/{RESULT}")


def _demo_splits(model: str) -> Path | None:
    """The splits of the demo that a run was trained on, or None for any other model."""
    run = run_of(model)
    if run is None:
        return None
    try:
        folder = Path(str(run_config(run)["data"]["heldout"])).parent / DEMO_SPLITS
    except (ValueError, KeyError):
        return None
    return folder if is_demo(folder) and folder.is_dir() else None


if __name__ == "__main__":
    sys.exit(main())
