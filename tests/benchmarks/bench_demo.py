"""The four approaches on the embedded demo, several seeds each: a Markdown table of mean and spread.

    python tests/benchmarks/bench_demo.py --seeds 0 1 2

Runs that are finished are not run again (runs/ALGO-REWARD-seedSEED), so it can be interrupted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
PAIRS = [(algo, reward) for algo in ("grpo", "ppo") for reward in ("teacher_logprob", "minillm")]


def run_one(algo: str, reward: str, seed: int, runs: Path, more: list[str]) -> dict[str, Any]:
    """One whole run; its summary."""
    command = [sys.executable, str(ROOT / "training" / "main.py"), "--algo", algo, "--reward", reward]
    subprocess.run([*command, "--seed", str(seed), "--runs_dir", str(runs), *more], cwd=ROOT, check=True)
    name = f"{algo}-{reward}" + (f"-seed{seed}" if seed else "")
    summary: dict[str, Any] = json.loads((runs / name / "summary.json").read_text())
    return summary


def spread(values: list[float], digits: int = 1) -> str:
    """`mean ± sample standard deviation`."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def row(algo: str, reward: str, summaries: list[dict[str, Any]]) -> str:
    """One line of the table."""

    def of(evaluation: str, key: str) -> list[float]:
        return [s[evaluation][key] for s in summaries]

    gain = [after - before for after, before in zip(of("eval_after", "f1"), of("eval_before", "f1"), strict=True)]
    fall = [
        100 * (1 - after / before)
        for after, before in zip(of("eval_after", "reverse_kl"), of("eval_before", "reverse_kl"), strict=True)
    ]
    cells = [
        f"{algo.upper()} + `{reward}`", spread(of("eval_after", "f1")), spread(gain),
        spread(of("eval_after", "exact_match")), spread(of("eval_after", "reverse_kl"), 3), f"{spread(fall)} %",
        f"{statistics.median(s['seconds']['total'] for s in summaries):.0f}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs_dir", type=Path, default=Path("runs"))
    arguments, more = parser.parse_known_args()
    lines = []
    first: dict[str, Any] = {}
    for algo, reward in PAIRS:
        summaries = [run_one(algo, reward, seed, arguments.runs_dir, more) for seed in arguments.seeds]
        first = first or summaries[0]
        lines.append(row(algo, reward, summaries))
    before, teacher = first["eval_before"], first["teacher_eval"]
    print(f"\n{len(arguments.seeds)} seeds; mean ± standard deviation; median seconds of the RL steps.\n")
    print("| approach | F1 | F1 gained | exact match | reverse KL | fall of reverse KL | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    print(f"| warm-up start | {before['f1']:.1f} | | {before['exact_match']:.1f} | {before['reverse_kl']:.3f} | | |")
    print("\n".join(lines))
    print(f"| teacher | {teacher['f1']:.1f} | | {teacher['exact_match']:.1f} | 0 by definition | | |")


if __name__ == "__main__":
    main()
