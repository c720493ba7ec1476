"""Score trained students on held-out questions, as the trainer does at a run's end.

    python eval/heldout.py                                  # the newest run's export
    python eval/heldout.py --model runs/a/export DIR ...    # several models, same questions
    python eval/heldout.py --data my-questions.jsonl        # other questions

Asks the questions of the run's held-out split, takes the greedy answers, and scores them with SQuAD's token F1 and
exact match, in percent. Its numbers are comparable between models scored here, not with EuroEval's leaderboard; for
that there is eval/run_euroeval.py. Needs no extra.

Templates, lengths and the held-out file come from the config.yaml of the run: of the first model that lies in a run
(runs/NAME/export), else of the newest run. Results: runs/NAME/eval/heldout.json; for a model outside of any run,
RUNS_DIR/models/NAME-HASH/eval/heldout.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # started as a script: our rooms first, and no file of this folder hides a library
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import yaml

from configs.files import write_atomically
from configs.jsonl import read_questions
from configs.schema import DEMO, RunConfig
from eval.model_dirs import check_model, newest_export, output_folder, run_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line that says what to mend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", nargs="+", type=Path, help="model directories (default: the newest run's export)")
    parser.add_argument("--data", type=Path, help="JSONL with question, answers and perhaps context, id in each row")
    parser.add_argument("--runs_dir", type=Path, default=Path(RunConfig().runs_dir), help="folder of all runs")
    args = parser.parse_args(arguments)
    try:
        plan = _plan(args.model, args.data, args.runs_dir)
    except (ValueError, OSError) as error:
        return _refuse(error)

    # Imported late: a mistake in the arguments is answered at once, not after seconds of importing torch.
    from eval.exam import AskSettings, load_exam, score_exam

    settings = AskSettings(**plan.settings)
    print(f"{len(plan.questions)} questions of {plan.data}, greedy; {plan.source}")
    results = []
    for model in plan.models:
        try:
            exam = load_exam(model, plan.questions, settings)
        except ValueError as error:
            return _refuse(error)
        result = score_exam(exam, plan.data, settings)
        output = output_folder(model, args.runs_dir) / "heldout.json"
        write_atomically(output, json.dumps(result, ensure_ascii=False, indent=1) + "\n")
        results.append((model, result, output))
    _print_table(results)
    return 0


def _refuse(error: Exception) -> int:
    """Say what to mend, in one line."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be asked of whom, checked as far as that goes without loading a model."""

    models: list[Path]
    """Model directories."""
    questions: list[dict[str, Any]]
    """Rows of the held-out file."""
    data: Path
    """The held-out file."""
    settings: dict[str, Any]
    """Fields of eval.exam.AskSettings."""
    source: str
    """Where the settings are from, for the reader."""


def _plan(models: list[Path] | None, data: Path | None, runs_dir: Path) -> Plan:
    """Check the models and the data; ValueError names what to mend."""
    models = models or [newest_export(runs_dir)]
    for model in models:
        check_model(model)
    run = _run_of_settings(models, runs_dir)
    config = _read_config(run)
    data = data or _heldout_file(config, run)
    return Plan(
        models=models,
        questions=read_questions(data),
        data=data,
        settings={
            "template": config["data"]["template"],
            "context_template": config["data"]["context_template"],
            "max_prompt_tokens": config["data"]["max_prompt_tokens"],
            "use_chat_template": config["data"]["use_chat_template"],
            "max_new_tokens": config["sampling"]["max_new_tokens"],
            "questions": config["eval"]["questions"],
            "batch": config["eval"]["batch"],
            "dtype": config["student"]["dtype"],
        },
        source=f"settings of {run / 'config.yaml'}" if run else "default settings",
    )


def _run_of_settings(models: list[Path], runs_dir: Path) -> Path | None:
    """The run whose config.yaml says how to ask: one for all models, or the table would compare unlike things."""
    own = next((run for run in map(run_of, models) if run), None)
    if own is not None:
        return own
    try:
        return run_of(newest_export(runs_dir))
    except ValueError:
        return None


def _read_config(run: Path | None) -> dict[str, Any]:
    """Settings of the run; what it does not say is as in configs/schema.py."""
    defaults = RunConfig()
    config: dict[str, Any] = {
        "data": {
            key: getattr(defaults.data, key)
            for key in ("heldout", "template", "context_template", "max_prompt_tokens", "use_chat_template")
        },
        "sampling": {"max_new_tokens": defaults.sampling.max_new_tokens},
        "eval": {"batch": defaults.eval.batch, "questions": defaults.eval.questions},
        "student": {"dtype": defaults.student.dtype},
    }
    if run is None:
        return config
    file = run / "config.yaml"
    try:
        written = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(written, dict):
        raise ValueError(f"{file}: a {type(written).__name__}, not a mapping; is this the config.yaml of a run?")
    for room, values in config.items():
        values.update(written.get(room) or {})
    return config


def _heldout_file(config: dict[str, Any], run: Path | None) -> Path:
    """The held-out split that the run was evaluated on."""
    data = config["data"]
    heldout = data.get("heldout_resolved") or data["heldout"]
    if heldout == DEMO:
        place = f"{run / 'config.yaml'} names no file" if run else "no run says which"
        raise ValueError(f"--data: no held-out questions to ask ({place}); give --data FILE.jsonl")
    return Path(heldout)


def _print_table(results: list[tuple[Path, dict[str, Any], Path]]) -> None:
    """The scores, one model a line."""
    width = max(len(str(model)) for model, _, _ in results)
    print(f"\n{'model':{width}}  questions     F1  exact match  seconds")
    for model, result, _ in results:
        print(
            f"{model!s:{width}}  {result['questions']:9d}  {result['f1']:5.1f}  {result['exact_match']:11.1f}"
            f"  {result['seconds']:7.1f}"
        )
    for _, result, output in results:
        skipped = result["skipped_too_long"]
        print(f"written: {output}" + (f" ({skipped} questions skipped: prompt too long)" if skipped else ""))
    print("SQuAD metrics on the held-out split; for EuroEval: python eval/run_euroeval.py")


if __name__ == "__main__":
    sys.exit(main())
