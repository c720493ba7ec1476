"""One GRPO step against TRL's GRPOTrainer with a teacher-log-probability reward, and each phase beside its floor.

    python tests/benchmarks/bench_step.py [--shape 400/32 32/128] [--dtype float32] [--rounds 3] [--skip-trl]

Student, reference and teacher have SmolLM2-135M's shape and random weights; G = 8, one prompt a step, every response
as long as the shape says, the same prompts on both sides, KL to a reference. Each side is a process with the same
threads (tests/benchmarks/step_ours.py, step_trl.py); they take turns, the first round is not counted, medians are.
Peak memory is the highest VmHWM, of trainer and teacher process added up on our side. A floor is the time of the
phase's matrix products alone, in the same process right after the step. TRL is installed by itself into --trl
at first use, and never enters our environment. Prints Markdown tables with the goals of docs/benchmarks.md; exit code
1 if one is missed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE)

import step_shared as shared

TRL = ("trl==1.16.0", "accelerate==1.15.0")
TIMES_GOAL = {"400/32": 7.0, "32/128": 2.0}
MEMORY_GOAL = {"400/32": 0.4}
PHASE_GOAL = {"prefill": 1.6, "decode": 1.5, "teacher": 1.6, "reference": 1.6, "update": 1.6}


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
    for name in ("dtype", "threads", "rounds", "prompts"):
        command += [f"--{name}", str(getattr(options, name))]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def take_turns(models: Path, shape: str, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Reports of each side, round by round, the first (warming up) left out."""
    sides = ["ours"] if options.skip_trl else ["ours", "trl"]
    workers = {side: start(side, models, shape, options) for side in sides}
    rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    try:
        for _ in range(options.rounds + 1):
            for side, worker in workers.items():
                assert worker.stdin is not None
                worker.stdin.write("\n")
                worker.stdin.flush()
                rounds[side].append(shared.read_report(worker.stdout))
    finally:
        for worker in workers.values():
            worker.stdin.close()  # type: ignore[union-attr]
            worker.wait(60)
    return {side: reports[1:] for side, reports in rounds.items()}


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


def show(shape: str, dtype: str, rounds: dict[str, list[dict[str, Any]]]) -> bool:
    """Print one shape's tables; whether all goals were met."""
    ours, passed = rounds["ours"], []
    our_time, our_memory = median(ours, "seconds"), ours[-1]["memory_gb"]
    print(f"\n### {shape}, {dtype}\n\n| | seconds | peak GB |\n| --- | --- | --- |")
    if "trl" in rounds:
        their_time, their_memory = median(rounds["trl"], "seconds"), rounds["trl"][-1]["memory_gb"]
        print(f"| TRL | {their_time:.2f} | {their_memory:.2f} |")
    parts = ours[-1]["memory"]
    print(f"| ours | {our_time:.2f} | {our_memory:.2f} ({parts['trainer']:.2f} + {parts['teacher']:.2f}) |")
    if "trl" in rounds:
        text, good = goal(their_time / our_time, TIMES_GOAL[shape], at_least=True)
        share = our_memory / their_memory
        memory_text, memory_good = goal(share, MEMORY_GOAL.get(shape, 1.0), at_least=False)
        passed += [good, memory_good]
        print(f"\n{their_time / our_time:.2f} times as fast ({text}); {share:.2f} of its memory ({memory_text})")
    print("\n| phase | seconds | floor | times the floor | goal |\n| --- | --- | --- | --- | --- |")
    for phase, limit in PHASE_GOAL.items():
        took, floor = median(ours, phase), median(ours, "floors", phase)
        text, good = goal(took / floor, limit, at_least=False)
        passed.append(good)
        print(f"| {phase} | {took:.2f} | {floor:.2f} | {took / floor:.2f} | {text.removeprefix('goal ')} |")
    worst = max(report["mismatch/max"] for report in ours)
    print(f"\nsampled against training log-probabilities: at most {worst:.1e} nats apart", flush=True)
    return all(passed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=list(shared.SHAPES), default=list(shared.SHAPES))
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=1, help="prompts in a step, 8 responses each")
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
        for dtype in options.dtype:
            for shape in options.shape:
                one = argparse.Namespace(**{**vars(options), "dtype": dtype})
                passed.append(show(shape, dtype, take_turns(Path(folder), shape, one)))
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
