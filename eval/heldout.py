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

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started as a script: the repository first, and no file of this folder hides a library
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from configs.io.jsonl import read_questions
from configs.schema import DEMO, RunConfig
from eval.cli import exit_code, parser_of
from eval.measure import run
from eval.measures.model import check_model, newest_export, run_config, run_of

ASKED = {
    "data": ("template", "max_prompt_tokens"),
    "student": ("prompt", "system_prompt", "chat_template_kwargs"),
    "sampling": ("max_new_tokens",),
    "eval": ("questions", "batch"),
}
"""Settings of a run that say how questions are put, by section of its config.yaml."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line that says what to mend."""
    parser = parser_of(__doc__)
    parser.add_argument("--model", nargs="+", help="directories or hub ids (default: the newest run's export)")
    parser.add_argument("--data", type=Path, help="questions with answers, in any layout of docs/data.md")
    args = parser.parse_args(arguments)
    return exit_code(lambda: ask(args.model, args.data, args.runs_dir))


def ask(models: list[str] | None, data: Path | None, runs_dir: Path) -> None:
    """Ask each model the held-out questions, and the run's open ones. Raises ValueError where something is to be
    mended."""
    models = models or [str(newest_export(runs_dir))]
    for model in models:
        check_model(model)
    settings, dtype, source, opened = _settings(models, data, runs_dir)
    print(f"{len(read_questions(settings['data']))} questions of {settings['data']}, greedy; {source}")
    # Imported late: a mistake in the arguments is answered at once, not after seconds of importing torch.
    from eval.measures.heldout import HeldoutSettings
    from eval.measures.open_questions import OpenSettings

    results = run("heldout", models, HeldoutSettings(**settings), dtype, runs_dir)
    if opened and data is None:
        print(f"open questions of {opened}, answers sampled")
        run("open_questions", models, OpenSettings(**settings | {"data": Path(opened)}), dtype, runs_dir)
    for result in results:
        if skipped := result.data["skipped_too_long"]:
            print(f"{result.model}: {skipped} questions skipped: prompt too long")
    print("SQuAD metrics on the held-out split; for EuroEval: python eval/run_euroeval.py")


def _settings(models: list[str], data: Path | None, runs_dir: Path) -> tuple[dict[str, Any], str, str, str | None]:
    """(fields of HeldoutSettings, dtype, where they are from, open questions); ValueError names what to mend."""
    run = _run_of_settings(models, runs_dir)
    config = run_config(run) if run else {}
    asked = {
        key: config[section][key] for section, keys in ASKED.items() for key in keys if key in config.get(section, {})
    }
    heldout = data or config.get("data", {}).get("heldout", DEMO)
    if heldout == DEMO:
        place = f"{run / 'config.yaml'} names no file" if run else "no run says which"
        raise ValueError(f"--data: no held-out questions to ask ({place}); give --data FILE.jsonl")
    dtype = config.get("student", {}).get("dtype", RunConfig().student.dtype)
    source = f"settings of {run / 'config.yaml'}" if run else "default settings"
    return {**asked, "data": Path(heldout)}, dtype, source, config.get("data", {}).get("open")


def _run_of_settings(models: list[str], runs_dir: Path) -> Path | None:
    """The run whose config.yaml says how to ask: one for all models, or the table would compare unlike things."""
    own = next((run for run in map(run_of, models) if run), None)
    if own is not None:
        return own
    try:
        return run_of(newest_export(runs_dir))
    except ValueError:
        return None


if __name__ == "__main__":
    sys.exit(main())
