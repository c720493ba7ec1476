"""Run the ablation of configs/ablation.yaml: every variant with every seed, then the table and the plot.

    python eval/run_ablation.py --jobs 2                        all of it; the same command again goes on
    python eval/run_ablation.py --only full no-kl --seeds 0     a part
    python eval/run_ablation.py --docs                          and docs/results.md

Finished runs are not started again. A run that fails is named at the end, and the others go on. In a SLURM job array
each task does the run of its number (SLURM_ARRAY_TASK_ID) and no table. Arguments that are not listed here go to
training/main.py. Exit codes: 0 all runs are finished, 1 some are not, 2 a mistake in the input, 75 stopped.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

if not __package__:  # started as a script: our rooms first, and no file of this folder hides a library
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from eval.ablation_plan import PLAN_FILE, Plan, Task, is_finished, read_plan, summary_of

ROOT = Path(__file__).resolve().parent.parent
STOPPED = 75


@dataclass
class Board:
    """What is running, what failed and how long a run takes."""

    runs_dir: Path
    total: int
    done: int = 0
    running: dict[Task, tuple[subprocess.Popen[bytes], float]] = field(default_factory=dict)
    failed: list[tuple[Task, int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    stopped: bool = False

    def log(self, task: Task) -> Path:
        """Everything that a run prints."""
        return self.runs_dir / "logs" / f"{task.name}.log"

    def time_left(self, waiting: int, jobs: int) -> str:
        """What is left at the mean pace so far."""
        if not self.seconds:
            return ""
        mean = sum(self.seconds) / len(self.seconds)
        begun = sum(min(time.monotonic() - start, mean) for _, start in self.running.values())
        minutes = ((waiting + len(self.running)) * mean - begun) / jobs / 60
        return f"; about {minutes:.0f} min left"


def parse_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Ours, and those for training/main.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--plan", type=Path, default=PLAN_FILE, help="the variants (configs/ablation.yaml)")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: the plan's")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="default: all of the plan")
    parser.add_argument("--steps", type=int, help="RL steps of each run; default: the plan's")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (1); each takes about one core")
    parser.add_argument("--runs_dir", type=Path, default=Path("runs/ablation"), help="where the run folders are")
    parser.add_argument("--cache_dir", type=Path, default=Path("runs/cache"), help="where the demo is built")
    parser.add_argument("--docs", action="store_true", help="write the table and plot into docs/ as well")
    options, more = parser.parse_known_args(arguments)
    for key in ("plan", "runs_dir", "cache_dir"):  # the runs' working directory is the repository
        setattr(options, key, getattr(options, key).resolve())
    return options, more


def command(plan: Plan, task: Task, options: argparse.Namespace, more: Sequence[str]) -> list[str]:
    """One run's command line; what the caller gave wins."""
    steps = [] if options.steps is None else ["--steps", str(options.steps)]
    return [
        sys.executable, str(ROOT / "training" / "main.py"), *plan.arguments(task.variant), *steps, *more,
        "--seed", str(task.seed), "--name", task.name, "--runs_dir", str(options.runs_dir),
        "--cache_dir", str(options.cache_dir),
    ]  # fmt: skip


def array_task(tasks: list[Task], index: str | None) -> list[Task]:
    """The one of a SLURM job array, or all. ValueError where the array is larger than the plan."""
    if index is None:
        return tasks
    if int(index) >= len(tasks):
        raise ValueError(f"SLURM_ARRAY_TASK_ID = {index}: there are {len(tasks)} runs; use --array=0-{len(tasks) - 1}")
    return [tasks[int(index)]]


def start(board: Board, task: Task, line: list[str]) -> None:
    """Start one run, its output in a file of its own."""
    board.log(task).parent.mkdir(parents=True, exist_ok=True)
    with board.log(task).open("ab") as out:
        # A group of its own, so that Ctrl-C reaches it once, through us.
        process = subprocess.Popen(
            line, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    board.running[task] = (process, time.monotonic())


def collect(board: Board, waiting: int, jobs: int) -> None:
    """Take note of the runs that have ended."""
    for task, (process, started) in list(board.running.items()):
        code = process.poll()
        if code is None:
            continue
        del board.running[task]
        board.done += 1
        summary = summary_of(board.runs_dir / task.name)
        if code == 0 and summary is not None:
            board.seconds.append(time.monotonic() - started)
            f1, kl = summary["eval_after"]["f1"], summary["eval_after"]["reverse_kl"]
            said = f"F1 {f1:.1f}, reverse KL {kl:.3f}, {board.seconds[-1]:.0f} s"
        else:
            board.failed.append((task, code))
            said = f"ended with exit code {code}: {board.log(task)}"
        print(f"[{board.done}/{board.total}] {task.name}: {said}{board.time_left(waiting, jobs)}", flush=True)


def run_all(board: Board, lines: dict[Task, list[str]], jobs: int) -> None:
    """All of them, `jobs` at a time. A signal is handed on: the runs write a checkpoint and leave."""

    def stop(number: int, frame: FrameType | None) -> None:
        board.stopped = True
        for process, _ in board.running.values():
            process.send_signal(signal.SIGTERM)

    former = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    waiting = list(lines)
    while (waiting and not board.stopped) or board.running:
        while waiting and len(board.running) < jobs and not board.stopped:
            task = waiting.pop(0)
            start(board, task, lines[task])
        time.sleep(0.2)
        collect(board, len(waiting), jobs)
    for number, handler in former.items():
        signal.signal(number, handler)


def report(board: Board) -> None:
    """Name what failed, with the end of what it said."""
    for task, code in board.failed:
        lines = board.log(task).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = [line for line in lines if "%|" not in line][-3:]  # progress bars are left out
        print(f"failed: {task.name}, exit code {code}; {board.log(task)} ends with:", file=sys.stderr)
        print("\n".join(f"    {line[-300:]}" for line in last), file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """See the exit codes above."""
    options, more = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    index = os.environ.get("SLURM_ARRAY_TASK_ID")
    try:
        plan = read_plan(options.plan)
        variants = plan.chosen(options.only)
        seeds = plan.seeds if options.seeds is None else options.seeds
        tasks = array_task([Task(variant, seed) for seed in seeds for variant in variants], index)
        if options.jobs < 1:
            raise ValueError(f"--jobs = {options.jobs}: must be at least 1")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    steps = int(plan.common["steps"]) if options.steps is None else options.steps
    pending = [task for task in tasks if not is_finished(options.runs_dir / task.name, steps)]
    print(f"ablation: {len(tasks)} runs, {len(tasks) - len(pending)} finished already", flush=True)
    board = Board(options.runs_dir, len(tasks), len(tasks) - len(pending))
    run_all(board, {task: command(plan, task, options, more) for task in pending}, options.jobs)
    if board.stopped:
        print("stopped; the same command goes on where the runs were", file=sys.stderr)
        return STOPPED
    report(board)
    written = make_table(options, index)
    return 1 if board.failed else written


def make_table(options: argparse.Namespace, index: str | None) -> int:
    """The measures that need a model, the table and the plot, in a process of its own; an array's task measures its
    run only when the table is made, so nothing is left to do for it."""
    if index is not None:
        return 0
    text = options.runs_dir / "heldout-text.jsonl"
    if not text.is_file():
        maker = [sys.executable, str(ROOT / "training" / "demo_text.py"), str(text)]
        if (code := subprocess.run(maker, cwd=ROOT, check=False).returncode) != 0:
            return code
    line = [sys.executable, str(ROOT / "eval" / "ablation.py"), "--runs_dir", str(options.runs_dir)]
    line += ["--plan", str(options.plan), "--text", str(text), *(["--docs"] if options.docs else [])]
    return subprocess.run(line, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
