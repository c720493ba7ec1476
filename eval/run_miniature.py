"""The real miniature in one command: Gemma-3-270M teaches SmolLM2-135M on Faroese text, two tokenizers.

    python eval/run_miniature.py --models DIR --text wiki_sentences.jsonl

DIR holds the two models as `smollm2-135m` and `gemma-3-270m`. Some sentences are held out; the others are raw text,
and their first words are the prompts that the student goes on from. Each arm of configs/miniature.yaml is trained from
the same start; then start, arms and teacher are measured on the held-out sentences (bits a character, minimal pairs),
and results.md, results.json and results.png are written into --runs_dir. The same command again goes on: what is
finished is not done again. Arguments that are not listed here go to every arm.
Exit codes: 0, 1 an arm failed, 2 a mistake in the input.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if not __package__:  # started as a script: our rooms first, and no file of this folder hides a library
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from configs.files import write_atomically
from configs.jsonl import read_jsonl
from eval.miniature_plan import PLAN_FILE, Arm, Plan, arguments, read_plan, split
from eval.miniature_table import draw, table
from eval.minimal_pairs import sentence_logprobs
from eval.perplexity import load_model
from rewards.minimal_pairs import make_pairs, score_pairs, sentences_of

ROOT = Path(__file__).resolve().parent.parent
STUDENT, TEACHER = "smollm2-135m", "gemma-3-270m"


def write_data(plan: Plan, text: Path, folder: Path) -> None:
    """text.jsonl, prompts.jsonl, heldout.jsonl (sentences) and questions.jsonl (their beginnings) in `folder`."""
    train, heldout = split([str(row["text"]) for row in read_jsonl(text, ["text"])], plan.heldout, plan.seed)

    def openings(sentences: Sequence[str]) -> list[dict[str, Any]]:
        cut = [sentence.split() for sentence in sentences]
        first = plan.opening_words
        return [
            {"question": " ".join(words[:first]), "answers": [" ".join(words[first:])]}
            for words in cut
            if len(words) > first
        ]

    files = {
        "text": [{"text": sentence} for sentence in train],
        "heldout": [{"text": sentence} for sentence in heldout],
        "prompts": openings(train),
        "questions": openings(heldout),
    }
    for name, rows in files.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(folder / f"{name}.jsonl", lines)


def run_arm(plan: Plan, arm: Arm, options: argparse.Namespace, more: Sequence[str]) -> int:
    """Train one arm, unless it is finished; what it prints goes to NAME.log. Returns its exit code."""
    runs: Path = options.runs_dir
    if is_finished(runs / arm.name):
        return 0
    paths = {
        "student.path": options.models / STUDENT,
        "teacher.path": options.models / TEACHER,
        "data.text": runs / "data" / "text.jsonl",
        "data.prompts": runs / "data" / "prompts.jsonl",
        "data.warmup": runs / "data" / "questions.jsonl",
        "data.heldout": runs / "data" / "questions.jsonl",
        "runs_dir": runs,
        "cache_dir": runs / "cache",
    }
    line = [sys.executable, str(ROOT / arm.program), *arguments(plan, arm, paths), *more, "--name", arm.name]
    begun = time.monotonic()
    with (runs / f"{arm.name}.log").open("ab") as out:
        code = subprocess.run(line, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=out, check=False).returncode
    minutes = (time.monotonic() - begun) / 60
    print(f"{arm.name}: exit code {code}, {minutes:.1f} min ({runs / arm.name}.log)", flush=True)
    if code == 0:
        write_atomically(runs / arm.name / "minutes.json", json.dumps({"minutes": round(minutes, 2)}) + "\n")
    return code


def is_finished(run: Path) -> bool:
    """Whether a run's summary says so."""
    path = run / "summary.json"
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["status"] == "finished"


def measure(name: str, model_dir: Path, plan: Plan, runs: Path) -> dict[str, Any]:
    """A model on the held-out sentences and their minimal pairs, as measured/NAME.json has it; measured once."""
    path = runs / "measured" / f"{name}.json"
    if path.is_file():
        return dict(json.loads(path.read_text(encoding="utf-8")))
    sentences = [str(row["text"]) for row in read_jsonl(runs / "data" / "heldout.jsonl", ["text"])]
    pairs = make_pairs(sentences, len(sentences), plan.seed)
    if not pairs:
        raise ValueError(f"{runs}/data/heldout.jsonl: no sentence of 4 to 40 words that a mistake can be made in")
    model, tokenizer = load_model(model_dir)
    values = sentence_logprobs(model, tokenizer, sentences_of(pairs), plan.batch)
    right, wrong = values[: len(pairs)], values[len(pairs) :]
    found = {
        "model": name,
        **asdict(score_pairs(pairs, right, wrong)),
        "right": right,
        "wrong": wrong,
        "sentences": [pair.right for pair in pairs],
    }
    write_atomically(path, json.dumps(found, ensure_ascii=False, indent=1) + "\n")
    said = f"{found['bits_per_character']:.3f} bits a character, {100 * found['accuracy']:.1f} % of {len(pairs)} pairs"
    print(f"{name}: {said}", flush=True)
    return found


def main(line: Sequence[str] | None = None) -> int:
    """See the exit codes above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--models", type=Path, required=True, help=f"folder with {STUDENT} and {TEACHER}")
    parser.add_argument("--text", type=Path, required=True, help="Faroese sentences: JSONL with `text`")
    parser.add_argument("--plan", type=Path, default=PLAN_FILE, help="the arms (configs/miniature.yaml)")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="default: all of the plan")
    parser.add_argument("--runs_dir", type=Path, default=Path("runs/miniature"), help="where everything is written")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of training and measuring (2)")
    options, more = parser.parse_known_args(line)
    for key in ("models", "text", "plan", "runs_dir"):  # the arms' working directory is the repository
        setattr(options, key, getattr(options, key).resolve())
    runs: Path = options.runs_dir
    torch.set_num_threads(options.threads)
    try:
        plan = read_plan(options.plan)
        arms = plan.chosen(options.only)
        for name in (STUDENT, TEACHER):
            if not (options.models / name / "config.json").is_file():
                raise ValueError(f"--models {options.models}: no model directory {name} in it")
        write_data(plan, options.text, runs / "data")
        measured = {"start": measure("start", options.models / STUDENT, plan, runs)}
        measured["teacher"] = measure("teacher", options.models / TEACHER, plan, runs)
        failed = []
        for arm in arms:
            if run_arm(plan, arm, options, [*more, "--threads", str(options.threads)]):
                failed.append(arm.name)
            else:
                measured[arm.name] = measure(arm.name, runs / arm.name / "export", plan, runs)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    page = table(plan, measured, runs)
    write_atomically(runs / "results.md", page)
    write_atomically(runs / "results.png", draw(plan, measured))
    print(f"\n{page}\n{runs}/results.md, results.png", flush=True)
    for name in failed:
        print(f"failed: {name}; see {runs / name}.log", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
