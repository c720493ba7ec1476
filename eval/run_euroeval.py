"""Stage 3: EuroEval's Faroese tasks, and the run's own held-out questions.

    python eval/run_euroeval.py                                     # the newest run's export
    python eval/run_euroeval.py --model runs/a/export DIR ORG/NAME  # several models, same tasks
    python eval/run_euroeval.py --iterations 2 --tasks foqa fosent  # a quicker look
    python eval/run_euroeval.py --data DIR                          # local splits (format: eval/euroeval_data.py)

The real `euroeval` package makes prompts, examples, bootstrap samples, labels and scores; the generation is ours, in
this process, on CPU or CUDA. A model of the embedded demo is judged on the demo's own splits, any other on the hub's
data where the hub answers within 5 s. Results: runs/NAME/eval/euroeval.json, for a model outside of any run
RUNS_DIR/models/NAME-HASH/eval/euroeval.json (eval/euroeval_run.py has the format). What is finished is kept: the same
command again goes on. Needs the extra: pip install -c constraints.txt 'euroeval>=16.11,<17'. docs/evaluation.md says
when the figures may be compared.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # started as a script: our rooms first, and no file of this folder hides a library
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import yaml

from configs.schema import RunConfig
from eval import heldout
from eval.euroeval_data import OFFICIAL, TASKS, Source, check_splits, probe_hub
from eval.euroeval_run import LEADERBOARD_ITERATIONS, Settings, evaluate
from eval.model_dirs import check_model, newest_export, output_folder, run_of

INSTALL = "EuroEval is not installed; pip install -c constraints.txt 'euroeval>=16.11,<17'"
DEMO_SPLITS = "euroeval"
"""Folder of the demo's splits, beside its held-out questions (training/demo_splits.py)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line that says what to mend."""
    args = _parse(arguments)
    try:
        plan = _plan(args)
    except (ValueError, OSError) as error:
        return _refuse(error)
    if args.heldout and (status := _ask_heldout(args, plan)) != 0:
        return status
    if importlib.util.find_spec("euroeval") is None:
        return _refuse(INSTALL)
    if plan.problem:
        return _refuse(plan.problem)
    results = []
    for name, model in plan.models:
        output = output_folder(model, args.runs_dir)
        try:
            result = evaluate(model, name, plan.settings, plan.source, plan.folder, output, Path(args.cache_dir))
        except ValueError as error:
            return _refuse(error)
        results.append((name, result, output))
    _print_table(results)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
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
    parser.add_argument("--runs_dir", type=Path, default=Path(RunConfig().runs_dir), help="folder of all runs")
    parser.add_argument("--cache_dir", default=f"{RunConfig().cache_dir}/euroeval", help="for the hub's data")
    args = parser.parse_args(arguments)
    for key in ("iterations", "batch"):
        if getattr(args, key) < 1:
            parser.error(f"--{key} = {getattr(args, key)}: must be at least 1")
    return args


def _refuse(reason: Exception | str) -> int:
    """Say what to mend, in one line."""
    print(f"error: {' '.join(str(reason).split())}", file=sys.stderr)
    return 2


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be asked of whom, checked as far as that goes without importing anything heavy."""

    models: list[tuple[str, Path]]
    """Name as the user gave it, and directory."""
    settings: Settings
    source: Source
    """Where the data come from."""
    folder: Path | None
    """Local splits; None: the hub."""
    problem: str | None
    """Why EuroEval cannot run; the held-out questions can be asked all the same."""


def _plan(args: argparse.Namespace) -> Plan:
    """Check models, data and output; ValueError names what to mend."""
    models = [(str(name), _model_dir(str(name))) for name in args.model or [newest_export(args.runs_dir)]]
    for name, model in models:
        check_model(model)
        _check_writable(output_folder(model, args.runs_dir), name)
    source, folder, problem = _data_source(args, [model for _, model in models])
    if folder is not None:
        check_splits(folder, args.tasks)
    settings = Settings(
        tasks=tuple(args.tasks),
        iterations=args.iterations,
        split=args.split,
        few_shot=not args.zero_shot,
        kind=args.kind,
        dtype=args.dtype,
        batch=args.batch,
    )
    return Plan(models=models, settings=settings, source=source, folder=folder, problem=problem)


def _model_dir(name: str) -> Path:
    """The directory, or what the hub has (or has had) under that name."""
    if Path(name).exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        return Path(name)
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, etag_timeout=5))
    except Exception as error:  # the hub's client raises nearly anything
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"--model {name}: no such directory, and the hub does not give it ({reason})") from error


def _check_writable(output: Path, name: str) -> None:
    """Nothing is ever written into the model's own directory, but results must go somewhere."""
    place = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise ValueError(
            f"--model {name}: results go to {output}, and {place} cannot be written; make it writable, or copy the "
            "model out of the run and give --runs_dir DIR"
        )


def _data_source(args: argparse.Namespace, models: Sequence[Path]) -> tuple[Source, Path | None, str | None]:
    """Where the data come from, their folder where that is not the hub, and why there are none."""
    if args.data is not None:
        return "local", args.data, None
    demo = next((found for found in map(_demo_splits, models) if found), None)
    if demo is not None and not args.hub:
        return "demo", demo, None
    said = probe_hub(args.tasks)
    problem = said and f"no data: the hub does not answer ({said}); give --data DIR with local splits"
    return "hub", None, problem


def _demo_splits(model: Path) -> Path | None:
    """The splits of the demo that a run was trained on, or None for any other model."""
    run = run_of(model)
    if run is None:
        return None
    try:
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        folder = Path(str(config["data"]["heldout"])).parent / DEMO_SPLITS
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None
    # The demo is built into a folder of this name (training/demo_models.py).
    return folder if folder.parent.name.startswith("demo-") and folder.is_dir() else None


def _ask_heldout(args: argparse.Namespace, plan: Plan) -> int:
    """The held-out questions of the runs among the models, as the trainer asks them (eval/heldout.py)."""
    own = [str(model) for _, model in plan.models if run_of(model)]
    return heldout.main(["--model", *own, "--runs_dir", str(args.runs_dir)]) if own else 0


def _print_table(results: Sequence[tuple[str, dict[str, Any], Path]]) -> None:
    """The scores, one model and task a line."""
    width = max(len(name) for name, _, _ in results)
    print(f"\n{'model':{width}}  {'task':16}  {'data':5}  scores (mean ± 95 % of the iterations)")
    for name, result, _ in results:
        for task, found in result["tasks"].items():
            scores = (
                f"{metric} {one['mean']:.1f}" + (f" ± {one['ci95']:.1f}" if one["ci95"] is not None else "")
                for metric, one in found["metrics"].items()
            )
            mark = "" if found["comparable"] else " *"
            print(f"{name:{width}}  {task:16}  {found['data']['source']:5}  {', '.join(scores)}{mark}")
    whys = [found["why_not"] for _, result, _ in results for found in result["tasks"].values()]
    if reasons := dict.fromkeys(reason for why in whys for reason in (why or "").split("; ") if reason):
        print("* not comparable with EuroEval's leaderboard: " + "; ".join(reasons))
    for _, result, output in results:
        print(f"written: {os.path.relpath(output)}/euroeval.json ({result['seconds']:.0f} s of evaluation)")


if __name__ == "__main__":
    sys.exit(main())
