"""One step against TRL's GRPOTrainer and DistillationTrainer, and each phase beside its floor.

    python tests/benchmarks/bench_step.py [--rival grpo distillation] [--shape 400/32 32/128 64/512] [--dtype float32]
        [--rounds 3] [--apart] [--skip-trl]

`grpo`: a teacher-log-probability reward and a KL to a reference. `distillation`: on-policy generalised JSD to the
teacher's whole distribution, ours by `recipe: gkd`. Student, reference and teacher have SmolLM2-135M's shape and random
weights; G = 8, one prompt a step, every response as long as the shape says, the same prompts on both sides. Each side
is a process with the same threads (tests/benchmarks/step_ours.py, step_trl.py); they take turns, the first round is not
counted, medians are. Peak memory is the highest VmHWM, of trainer and teacher process added up on our side. A floor is
the time of the phase's matrix products alone, in the same process right after the step. TRL is installed by itself into
--trl at first use, and never enters our environment. Prints Markdown tables with the goals of docs/benchmarks.md; exit
code 1 if one is missed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE)

import step_shared as shared

TRL = ("trl==1.16.0", "accelerate==1.15.0")
TIMES_GOAL = {"grpo": {"400/32": 8.0, "32/128": 2.2, "64/512": 1.5}, "distillation": {"400/32": 3.0, "32/128": 1.5}}
MEMORY_GOAL = {"grpo": 0.4, "distillation": 0.5}
PHASE_GOAL = {"float32": 1.5, "bfloat16": 1.8}
PHASES = ("prefill", "decode", "teacher", "reference", "update")


def install_trl(folder: Path) -> None:
    """TRL without its dependencies, which are ours as well, into a folder of its own."""
    if not (folder / "trl").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *TRL], check=True
        )


def start(side: str, models: Path, shape: str, options: argparse.Namespace) -> subprocess.Popen[str]:
    """A worker that runs a step for each line that it is sent."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    if side == "trl":
        environment["PYTHONPATH"] = os.pathsep.join([str(options.trl.resolve()), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / f"step_{side}.py"), "--models", str(models), "--shape", shape]
    for name in ("dtype", "rival", "threads", "rounds", "prompts"):
        command += [f"--{name}", str(getattr(options, name))]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def take_turns(models: Path, shape: str, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Reports of each side, round by round; a process's first, in which it warms up, is left out."""
    sides = ["ours"] if options.skip_trl else ["ours", "trl"]
    rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    if options.apart:
        for side in sides * options.rounds:
            with working([side], models, shape, options) as workers:
                ask(workers[side])
                rounds[side].append(ask(workers[side]))
        return rounds
    with working(sides, models, shape, options) as workers:
        for _ in range(options.rounds + 1):
            for side, worker in workers.items():
                rounds[side].append(ask(worker))
    return {side: reports[1:] for side, reports in rounds.items()}


@contextmanager
def working(
    sides: Sequence[str], models: Path, shape: str, options: argparse.Namespace
) -> Iterator[dict[str, subprocess.Popen[str]]]:
    workers = {side: start(side, models, shape, options) for side in sides}
    try:
        yield workers
    finally:
        for worker in workers.values():
            worker.stdin.close()  # type: ignore[union-attr]
            worker.wait(60)


def ask(worker: subprocess.Popen[str]) -> dict[str, Any]:
    """One step, and its report."""
    assert worker.stdin is not None
    worker.stdin.write("\n")
    worker.stdin.flush()
    return shared.read_report(worker.stdout)


def median(reports: list[dict[str, Any]], *keys: str) -> float:
    values = []
    for report in reports:
        value: Any = report
        for key in keys:
            value = value[key]
        values.append(float(value))
    return statistics.median(values)


def goal(value: float, limit: float, at_least: bool) -> tuple[str, bool]:
    good = value >= limit if at_least else value <= limit
    return f"goal {'>=' if at_least else '<='} {limit}: {'PASS' if good else 'FAIL'}", good


def side_row(name: str, reports: list[dict[str, Any]], tokens: int) -> str:
    """One side's seconds a phase, memory and speed. Sampling is prefill and decoding, scoring teacher and reference."""
    whole = median(reports, "seconds")
    phases = " | ".join(f"{median(reports, phase):.2f}" for phase in ("sample", "score", "update"))
    return f"| {name} | {phases} | {whole:.2f} | {tokens / whole:.1f} | {reports[-1]['memory_gb']:.2f} |"


def show(shape: str, options: argparse.Namespace, rounds: dict[str, list[dict[str, Any]]]) -> bool:
    """Print one shape's tables; whether all goals were met."""
    ours, passed = rounds["ours"], []
    tokens = options.prompts * shared.GROUP * shared.SHAPES[shape][1]
    print(f"\n### {options.rival}, {shape}, {options.dtype}, load {os.getloadavg()[0]:.1f}\n")
    print("| | sample, s | score, s | update, s | step, s | response tokens/s | peak GB |\n" + "| --- " * 7 + "|")
    if "trl" in rounds:
        print(side_row("TRL", rounds["trl"], tokens))
    for report in ours:
        report["sample"] = report["prefill"] + report["decode"]
        report["score"] = report["teacher"] + report["reference"]
    print(side_row("ours", ours, tokens))
    if "trl" in rounds:
        times = median(rounds["trl"], "seconds") / median(ours, "seconds")
        share = ours[-1]["memory_gb"] / rounds["trl"][-1]["memory_gb"]
        text, good = goal(times, TIMES_GOAL[options.rival].get(shape, 1.0), at_least=True)
        memory_text, memory_good = goal(share, MEMORY_GOAL[options.rival], at_least=False)
        passed += [good, memory_good]
        print(f"\n{times:.2f} times as fast ({text}); {share:.2f} of its memory ({memory_text})")
    print("\n| phase | seconds | floor | times the floor | goal |\n" + "| --- " * 5 + "|")
    for phase in PHASES:
        if phase in ours[-1]["floors"]:
            took, floor = median(ours, phase), median(ours, "floors", phase)
            text, good = goal(took / floor, PHASE_GOAL[options.dtype], at_least=False)
            passed.append(good)
            print(f"| {phase} | {took:.2f} | {floor:.2f} | {took / floor:.2f} | {text.removeprefix('goal ')} |")
    parts = ours[-1]["memory"]
    worst = max(report["mismatch/max"] for report in ours)
    print(f"\nour memory: trainer {parts['trainer']:.2f}, teacher {parts['teacher']:.2f} GB")
    print(f"sampled against training log-probabilities: at most {worst:.1e} nats apart", flush=True)
    return all(passed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rival", nargs="+", choices=list(TIMES_GOAL), default=["grpo"])
    parser.add_argument("--shape", nargs="+", choices=list(shared.SHAPES), default=["400/32", "32/128"])
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=1, help="prompts in a step, 8 responses each")
    parser.add_argument(
        "--apart", action="store_true", help="one process at a time, started anew each round: less memory, more time"
    )
    parser.add_argument("--skip-trl", action="store_true", help="our side alone")
    parser.add_argument(
        "--trl", type=Path, default=HERE.parent.parent / "runs" / "cache" / "-".join(TRL[0].split("=="))
    )
    options = parser.parse_args()
    if not options.skip_trl:
        install_trl(options.trl)
    passed = []
    with tempfile.TemporaryDirectory() as folder:
        shared.build_models(Path(folder))
        for rival, dtype, shape in itertools.product(options.rival, options.dtype, options.shape):
            one = argparse.Namespace(**{**vars(options), "dtype": dtype, "rival": rival})
            passed.append(show(shape, one, take_turns(Path(folder), shape, one)))
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
