"""Stage 3: EuroEval's Faroese tasks, and the run's own held-out questions.

    python eval/run_euroeval.py                                     # the newest run's export
    python eval/run_euroeval.py --model runs/a/export DIR ORG/NAME  # several models, same tasks
    python eval/run_euroeval.py --iterations 2 --tasks foqa fosent  # a quicker look
    python eval/run_euroeval.py --data DIR                          # local splits (format: eval/euroeval/data.py)

The real `euroeval` package makes prompts, examples, bootstrap samples, labels and scores; the generation is ours, in
this process, on CPU or CUDA. A model of the embedded demo is measured on the demo's own splits, any other on the hub's
data where the hub answers within 5 s. Results: runs/NAME/eval/euroeval.json, for a model outside of any run
RUNS_DIR/models/NAME-HASH/eval/euroeval.json (eval/euroeval/run.py has the format). What is finished is kept: the same
command again goes on. Needs the extra: pip install -c constraints.txt 'euroeval>=16.11,<17'. docs/evaluation.md says
when the figures may be compared.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a script: the repository first, and no file of this folder hides a library
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from configs.io.results import Result
from configs.schema import RunConfig
from eval import heldout
from eval.cli import exit_code, parser_of
from eval.euroeval.data import OFFICIAL, TASKS, Source, check_splits, probe_hub
from eval.euroeval.run import LEADERBOARD_ITERATIONS, RESULT, Settings, evaluate
from eval.measures.model_dirs import check_model, newest_export, output_folder, run_config, run_of

INSTALL = "EuroEval is not installed; pip install -c constraints.txt 'euroeval>=16.11,<17'"
DEMO_SPLITS = "euroeval"
"""Folder of the demo's splits, beside its held-out questions (training/data/demo/splits.py)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line that says what to mend."""
    parser = parser_of(__doc__)
    parser.add_argument("--model", nargs="+", help="directories or hub ids (default: the newest run's export)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(OFFICIAL), help="default: the official ones")
    parser.add_argument("--iterations", type=int, default=LEADERBOARD_ITERATIONS, help="bootstrap samples (10)")
    parser.add_argument("--split", choices=("test", "val"), default="test", help="which split is scored (test)")
    parser.add_argument("--zero_shot", action="store_true", help="show no examples")
    parser.add_argument("--kind", choices=("base", "instruct"), help="default: instruct where there is a chat template")
    parser.add_argument("--data", type=Path, help="folder with local splits")
    parser.add_argument("--hub", action="store_true", help="the hub's data for a model of the demo too")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="float32, or bfloat16 on CUDA")
    parser.add_argument("--batch", type=int, default=16, help="rows generated at a time (16)")
    parser.add_argument("--no_heldout", dest="heldout", action="store_false", help="leave the run's questions out")
    parser.add_argument("--cache_dir", default=f"{RunConfig().cache_dir}/euroeval", help="for the hub's data")
    args = parser.parse_args(arguments)
    for key in ("iterations", "batch"):
        if getattr(args, key) < 1:
            parser.error(f"--{key} = {getattr(args, key)}: must be at least 1")
    return exit_code(lambda: ask(args))


def ask(args: argparse.Namespace) -> None:
    """Every model the tasks, and the run's own held-out questions first. Raises ValueError where something is to be
    mended, in models, data and output before anything heavy is imported."""
    # As the user calls them, which says where results go: those of a hub id not by its place in the hub's cache.
    models = [str(model) for model in args.model or [newest_export(args.runs_dir)]]
    for model in models:
        check_model(model)
        _check_writable(output_folder(model, args.runs_dir), model)
    source, folder, problem = _data_source(args, models)
    if folder is not None:
        check_splits(folder, args.tasks)
    settings = Settings(
        tasks=tuple(args.tasks),
        source=source,
        folder=folder,
        cache_dir=Path(args.cache_dir),
        iterations=args.iterations,
        split=args.split,
        few_shot=not args.zero_shot,
        kind=args.kind,
        batch=args.batch,
    )
    if args.heldout and (own := [model for model in models if run_of(model)]):
        heldout.ask(own, None, args.runs_dir)
    if importlib.util.find_spec("euroeval") is None:
        raise ValueError(INSTALL)
    if problem:  # the held-out questions could be asked all the same
        raise ValueError(problem)
    import torch

    from eval.measures.model import Model

    dtype = args.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    results = [evaluate(Model(path=model, dtype=dtype, runs_dir=args.runs_dir), settings) for model in models]
    _print_table(results)
    for model in models:
        print(f"written: {os.path.relpath(output_folder(model, args.runs_dir))}/{RESULT}")


def _check_writable(output: Path, name: str) -> None:
    """Nothing is ever written into the model's own directory, but results must go somewhere."""
    place = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise ValueError(
            f"--model {name}: results go to {output}, and {place} cannot be written; make it writable, or copy the "
            "model out of the run and give --runs_dir DIR"
        )


def _data_source(args: argparse.Namespace, models: Sequence[str]) -> tuple[Source, Path | None, str | None]:
    """Where the data come from, their folder where that is not the hub, and why there are none."""
    if args.data is not None:
        return "local", args.data, None
    demo = next((found for found in map(_demo_splits, models) if found), None)
    if demo is not None and not args.hub:
        return "demo", demo, None
    said = probe_hub(args.tasks)
    problem = said and f"no data: the hub does not answer ({said}); give --data DIR with local splits"
    return "hub", None, problem


def _demo_splits(model: str) -> Path | None:
    """The splits of the demo that a run was trained on, or None for any other model."""
    run = run_of(model)
    if run is None:
        return None
    try:
        folder = Path(str(run_config(run)["data"]["heldout"])).parent / DEMO_SPLITS
    except (ValueError, KeyError):
        return None
    # The demo is built into a folder of this name (training/data/demo/models.py).
    return folder if folder.parent.name.startswith("demo-") and folder.is_dir() else None


def _print_table(results: Sequence[Result]) -> None:
    """The scores, one model and task a line."""
    width = max(len(result.model) for result in results)
    print(f"\n{'model':{width}}  {'task':16}  {'data':5}  scores (mean ± 95 % of the iterations)")
    for result in results:
        for row in result.rows:
            task = row["task"]
            values = {metric: result.values[f"{task}/{metric}"] for metric in row["scores"]}
            scores = (
                f"{metric} {one.value:.1f}" + (f" ± {one.high - one.value:.1f}" if one.high is not None else "")
                for metric, one in values.items()
            )
            star = "" if row["comparable"] else " *"
            print(f"{result.model:{width}}  {task:16}  {result.data[task]['source']:5}  {', '.join(scores)}{star}")
    whys = [row["why_not"] for result in results for row in result.rows]
    if reasons := dict.fromkeys(reason for why in whys for reason in (why or "").split("; ") if reason):
        print("* not comparable with EuroEval's leaderboard: " + "; ".join(reasons))
    seconds = sum(row["seconds"] for result in results for row in result.rows)
    print(f"{seconds:.0f} s of evaluation")


if __name__ == "__main__":
    sys.exit(main())
