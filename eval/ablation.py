"""The ablation's table, from its run folders: held-out F1, reverse KL, bits a byte and language rate over seeds.

    python eval/ablation.py --runs_dir runs/ablation --text runs/ablation/heldout-text.jsonl [--docs]

Called by eval/run_ablation.py. F1 and reverse KL are those of each run's summary.json; what needs the trained student
(bits a byte, language rate) is measured here once and kept in the run's folder. Writes ablation.md and ablation.png
into the runs' folder; with --docs also into docs/results.md (between its two markers) and docs/images/.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if not __package__:  # started as a script: our rooms first, and no file of this folder hides a library
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from configs.files import write_atomically
from eval.ablation_plan import MEASURED, PLAN_FILE, Plan, Task, Variant, read_plan, run_config, summary_of

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results.md"
IMAGE = ROOT / "docs" / "images" / "ablation.png"
BEGIN, END = "<!-- ablation:begin -->", "<!-- ablation:end -->"
MEASURES = ("f1", "reverse_kl", "bits_per_byte", "language_rate")
HEADS = {"f1": "F1", "reverse_kl": "reverse KL", "bits_per_byte": "bits a byte", "language_rate": "Faroese"}
DIGITS = {"f1": 1, "reverse_kl": 3, "bits_per_byte": 3, "language_rate": 1}
CONTINUATIONS = 256

Scores = dict[str, float]


@dataclass(frozen=True)
class Result:
    """One finished run."""

    task: Task
    before: Scores
    """`MEASURES` of the student at the start."""
    after: Scores
    teacher: Scores
    tokens: int
    """Response tokens that were trained on, sampled or the teacher's."""
    seconds: float
    """Wall-clock of the steps."""
    steps: int


# --- measuring -----------------------------------------------------------------------------------------------------


def measure_model(path: str | Path, texts: Sequence[str], data: Sequence[str]) -> dict[str, Any]:
    """Bits a byte on `texts`, and the language rate behind their openings. `data`: JSONL files of known words."""
    from eval.language import continue_texts, language_rate, openings, vocabulary
    from eval.perplexity import load_model, score

    model, tokenizer = load_model(path)
    starts = [opening for opening, _ in openings(texts, CONTINUATIONS)]
    made = continue_texts(model, tokenizer, starts)
    rate = language_rate(made, vocabulary(data))
    samples = [one.opening + " |" + one.text for one in made[:8]]
    return {
        **asdict(score(model, tokenizer, texts)),
        "language_rate": rate.continuations,
        "known_words": rate.words,
        "empty": rate.empty,
        "samples": samples,
    }


def judge_of_text(texts: Sequence[str], data: Sequence[str]) -> dict[str, float]:
    """What the language rate says of the held-out text itself, and of the same with shuffled letters."""
    from eval.language import Continuation, language_rate, openings, shuffled, vocabulary

    known, rng = vocabulary(data), random.Random(0)
    pairs = openings(texts, CONTINUATIONS)
    own = [Continuation(opening, rest, True) for opening, rest in pairs]
    mixed = [Continuation(opening, shuffled(rest, rng), True) for opening, rest in pairs]
    return {
        "text": language_rate(own, known).continuations,
        "text_words": language_rate(own, known).words,
        "shuffled": language_rate(mixed, known).continuations,
        "shuffled_words": language_rate(mixed, known).words,
    }


def known_data(config: Mapping[str, Any]) -> list[str]:
    """The JSONL files that a run read."""
    data = config["data"]
    return [path for path in (data["prompts"], data["warmup"], data["heldout"], data["text"]) if path]


def kept(path: Path, key: str, measure: Any) -> dict[str, Any]:
    """What an earlier call measured with the same `key`, or a new measurement."""
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found.get("key") == key:
            return found
    found = {"key": key, **measure()}
    write_atomically(path, json.dumps(found, ensure_ascii=False, indent=2) + "\n")
    return found


def read_result(task: Task, runs_dir: Path, text: Path, texts: Sequence[str]) -> Result | None:
    """One run with all measures, or None where it is not finished."""
    run = runs_dir / task.name
    summary = summary_of(run)
    if summary is None:
        return None
    config = run_config(run)
    data = known_data(config)
    text_key = hashlib.sha256(text.read_bytes()).hexdigest()[:12]

    def student(path: str, name: str) -> dict[str, Any]:
        file = run / MEASURED if name == "after" else runs_dir / "reference" / f"{name}.json"
        key = f"{text_key} {path} {Path(path, 'model.safetensors').stat().st_mtime_ns}"
        return kept(file, key, lambda: measure_model(path, texts, data))

    def scores(evaluation: str, path: str, name: str) -> Scores:
        measured = student(path, name)
        return {key: float({**measured, **summary[evaluation]}[key]) for key in MEASURES}

    return Result(
        task,
        scores("eval_before", config["student"]["path"], "start"),
        scores("eval_after", str(run / "export"), "after"),
        scores("teacher_eval", config["teacher"]["path"], "teacher"),
        int(summary["tokens"].get("sampled", 0)),
        float(summary["seconds"]["total"]),
        int(summary["steps"]),
    )


# --- the tables ----------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], digits: int, sign: bool = False) -> str:
    """`mean ± sample standard deviation`; one value alone has none."""
    plus = "+" if sign else ""
    mean = f"{statistics.mean(values):{plus}.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def by_variant(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results by name of the variant, in order of seed."""
    found: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda one: one.task.seed):
        found.setdefault(result.task.variant.name, []).append(result)
    return found


def main_table(plan: Plan, results: Sequence[Result]) -> list[str]:
    """Mean ± deviation of each variant, and how far it went from the start."""
    found = by_variant(results)
    heads = [f"{HEADS[key]}{part}" for key in MEASURES for part in ("", " gained" if key == "f1" else " change")]
    heads = [head for head in heads if head != "reverse KL change"]
    lines = ["| variant | " + " | ".join(heads) + " | tokens (k) | seconds |", "| --- |" + " ---: |" * (len(heads) + 2)]
    for name, title in (("before", "start (after the warm-up)"), ("teacher", "teacher")):
        cells = []
        for key in MEASURES:
            values = _by_seed(results, name, key)
            cells += [spread(values, DIGITS[key])] + ([] if key == "reverse_kl" else [""])
        lines.append(f"| *{title}* | " + " | ".join(cells) + " | | |")
    for group, heading in plan.groups.items():
        rows = [_row(variant, found[variant.name]) for variant in plan.variants
                if variant.group == group and variant.name in found]  # fmt: skip
        if rows:
            lines += ["| **" + heading + "** |" + " |" * (len(heads) + 2), *rows]
    return lines


def _by_seed(results: Sequence[Result], stage: str, key: str) -> list[float]:
    """A reference's value for each seed: all variants of a seed have the same, so the first one's."""
    values: dict[int, float] = {}
    for result in results:
        values.setdefault(result.task.seed, getattr(result, stage)[key])
    known = list(values.values())
    return known[:1] if len(set(known)) == 1 else known


def _row(variant: Variant, runs: Sequence[Result]) -> str:
    """One variant of the main table."""
    cells = []
    for key in MEASURES:
        cells.append(spread([run.after[key] for run in runs], DIGITS[key]))
        if key != "reverse_kl":
            cells.append(spread([run.after[key] - run.before[key] for run in runs], DIGITS[key], sign=True))
    tokens = statistics.mean(run.tokens for run in runs) / 1000
    by_teacher = " (teacher's)" if variant.settings.get("recipe") in ("seqkd", "sampled_ce") else ""
    seconds = statistics.median(run.seconds for run in runs)
    return f"| `{variant.name}` | " + " | ".join(cells) + f" | {tokens:.0f}{by_teacher} | {seconds:.0f} |"


def parts_table(plan: Plan, results: Sequence[Result], whole: str = "full") -> list[str]:
    """What changes against `whole`, seed by seed; ` *` where every seed agrees in sign and there are several."""
    found = by_variant(results)
    if whole not in found:
        return []
    full = {run.task.seed: run for run in found[whole]}
    lines = ["| against `" + whole + "` | " + " | ".join(HEADS[key] for key in MEASURES) + " |",
             "| --- |" + " ---: |" * len(MEASURES)]  # fmt: skip
    for variant in plan.variants:
        runs = [run for run in found.get(variant.name, []) if run.task.seed in full]
        if variant.name == whole or not runs:
            continue
        cells = []
        for key in MEASURES:
            gaps = [run.after[key] - full[run.task.seed].after[key] for run in runs]
            agree = len(gaps) > 1 and (min(gaps) > 0 or max(gaps) < 0)
            cells.append(spread(gaps, DIGITS[key], sign=True) + (" *" if agree else ""))
        lines.append(f"| `{variant.name}` | " + " | ".join(cells) + " |")
    return lines if len(lines) > 2 else []


def render(plan: Plan, results: Sequence[Result], judge: Mapping[str, float], missing: Sequence[str]) -> str:
    """The section for docs/results.md, complete in itself."""
    seeds = sorted({result.task.seed for result in results})
    steps = sorted({result.steps for result in results})
    known = [variant for variant in plan.variants if variant.name in by_variant(results)]
    lines = [
        f"{len(results)} runs: {len(known)} variants, seeds {', '.join(map(str, seeds))}, "
        f"{' or '.join(map(str, steps))} steps each. Mean ± sample standard deviation over seeds; *gained* and "
        "*change* are against the start of the same run.",
        "",
        *main_table(plan, results),
        "",
        "Lower is better for reverse KL (nats a token) and bits a byte; F1 and Faroese are percentages. Tokens: in the "
        "responses that were learnt from. Seconds: the steps of one run, median; other runs went on beside it.",
        "",
    ]
    parts = parts_table(plan, results)
    if parts:
        star = (
            " `*`: every seed agrees in sign, which happens by chance in "
            f"{100 * 0.5 ** (len(seeds) - 1):.0f} % of cases where there is no difference at all."
        )
        lines += [
            f"Differences to `full`, paired by seed.{star if len(seeds) > 1 else ''}",
            "",
            *parts,
            "",
        ]
    lines += [
        f"The measure of language, calibrated: of the held-out text's own sentences it calls {judge['text']:.1f} % "
        f"Faroese ({judge['text_words']:.1f} % of words known), of the same with the letters of each word shuffled "
        f"{judge['shuffled']:.1f} % ({judge['shuffled_words']:.1f} % of words).",
        "",
        "The variants:",
        "",
        *(f"- `{variant.name}`: {variant.what}." for variant in known),
    ]
    if missing:
        lines += ["", f"Not finished, so not in the tables: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def put_between(page: str, section: str) -> str:
    """The page with `section` between its markers; ValueError where it has none."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"{RESULTS}: needs one line {BEGIN} and one line {END} behind it")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{section}\n{END}{rest.split(END)[1]}"


# --- all of it -----------------------------------------------------------------------------------------------------


def make_report(plan: Plan, runs_dir: Path, text: Path, docs: bool) -> str:
    """Measure what is not measured yet, write table and plot; the table. ValueError where there is nothing."""
    import torch

    from eval.ablation_plot import draw
    from eval.perplexity import read_texts

    torch.set_num_threads(1)  # models this small gain nothing from a second
    texts = read_texts(text)
    seeds = sorted({*plan.seeds, *_seeds_on_disk(runs_dir)})
    tasks = [Task(variant, seed) for variant in plan.variants for seed in seeds]
    read = {task: read_result(task, runs_dir, text, texts) for task in tasks if (runs_dir / task.name).is_dir()}
    results = [result for result in read.values() if result is not None]
    if not results:
        raise ValueError(f"{runs_dir}: no finished run of the plan")
    missing = [task.name for task, result in read.items() if result is None]
    data = known_data(run_config(runs_dir / results[0].task.name))
    judge = judge_of_text(texts, data)
    section = render(plan, results, judge, missing)
    picture = draw(plan, results)
    write_atomically(runs_dir / "ablation.png", picture)
    write_atomically(runs_dir / "ablation.md", section)
    if docs:
        alt = "Held-out F1, reverse KL, bits a byte and language rate of every variant, one dot a seed"
        write_atomically(IMAGE, picture)
        linked = f"![{alt}](images/{IMAGE.name})\n\n{section}"
        write_atomically(RESULTS, put_between(RESULTS.read_text(encoding="utf-8"), linked))
    return section


def _seeds_on_disk(runs_dir: Path) -> set[int]:
    """Seeds that folders are named after, also beyond the plan's."""
    ends = (path.name.rpartition("-seed")[2] for path in runs_dir.glob("*-seed*"))
    return {int(end) for end in ends if end.isdigit()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line that says what to mend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--runs_dir", type=Path, default=Path("runs/ablation"), help="where the run folders are")
    parser.add_argument("--text", type=Path, required=True, help="JSONL of held-out Faroese text")
    parser.add_argument("--plan", type=Path, default=PLAN_FILE, help="the variants (configs/ablation.yaml)")
    parser.add_argument("--docs", action="store_true", help="write docs/results.md and its plot as well")
    options = parser.parse_args(arguments)
    try:
        print("\n" + make_report(read_plan(options.plan), options.runs_dir, options.text, options.docs))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"table and plot: {options.runs_dir / 'ablation.md'}, {options.runs_dir / 'ablation.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
