"""Run an experiment: every variant of a plan with every seed, then the table and the plot.

    python eval/run_experiment.py configs/ablation.yaml --jobs 2                      all of it
    python eval/run_experiment.py configs/ablation.yaml --only grpo-minillm --seeds 0   a part
    python eval/run_experiment.py configs/miniature.yaml --with models=DIR text=FILE  a plan that asks for ${models}

Run the same command again to continue: a finished run is not started again, and a model is measured once. A run that
fails is named at the end, and the others continue. Writes results.md and results.png into --runs_dir. In a SLURM array
each task does the run of its number (SLURM_ARRAY_TASK_ID) and no table. Other arguments go to each run.
Exit codes: 0 all runs are finished, 1 some are not, 2 a mistake in the input, 75 stopped by a signal.
docs/extending.md shows how to write a plan.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

if not __package__:  # started as a script: our folders first, and no file of this folder hides a library
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import yaml

from configs.io.files import locked, read_json, write_atomically
from configs.schema import RunConfig, as_dict, flat
from eval.cli import exit_code, parser_of
from eval.experiments.plan import ROOT, Plan, Task, filled, flags, models_of, read_plan, summary_of

STOPPED = 75


@dataclass
class Runner:
    """Starts programs, `jobs` at a time, each with a log of its own. After a signal nothing is started any more, and
    what runs gets SIGTERM: a trainer writes a checkpoint and leaves."""

    logs: Path
    jobs: int = 1
    stopped: bool = False
    codes: dict[str, int] = field(default_factory=dict)
    """Exit code by name of what has ended."""

    def __post_init__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` leaves it
                signal.signal(number, lambda *_: setattr(self, "stopped", True))

    def log(self, name: str) -> Path:
        """Everything that a program prints."""
        return self.logs / f"{name}.log"

    def run(self, commands: Mapping[str, Sequence[str]]) -> bool:
        """Run Python programs by name; whether all of them ended with 0."""
        waiting, told = list(commands), False
        running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
        while (waiting and not self.stopped) or running:
            if self.stopped and not told:
                told = True
                for process, _ in running.values():
                    process.send_signal(signal.SIGTERM)
            while waiting and len(running) < self.jobs and not self.stopped:
                name = waiting.pop(0)
                running[name] = (self._start(name, commands[name]), time.monotonic())
            time.sleep(0.2)
            for name, (process, begun) in list(running.items()):
                if (code := process.poll()) is not None:
                    del running[name]
                    self.codes[name] = code
                    left = f"; {len(waiting) + len(running)} to go" if waiting or running else ""
                    said = f"{time.monotonic() - begun:.0f} s" if code == 0 else f"exit code {code}: {self.log(name)}"
                    print(f"{name}: {said}{left}", flush=True)
        return not self.stopped and all(self.codes[name] == 0 for name in commands)

    def _start(self, name: str, words: Sequence[str]) -> subprocess.Popen[bytes]:
        self.logs.mkdir(parents=True, exist_ok=True)
        line = [sys.executable, str(ROOT / words[0]), *words[1:]]
        with self.log(name).open("ab") as out:
            # A group of its own, so that Ctrl-C reaches it once, through us.
            return subprocess.Popen(
                line, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )

    def report(self) -> None:
        """Name what failed, with the end of what it said."""
        for name in (name for name, code in self.codes.items() if code):
            lines = self.log(name).read_text(encoding="utf-8", errors="replace").strip().splitlines()
            last = [line[-300:] for line in lines if "%|" not in line][-3:]  # progress bars are left out
            print(f"failed: {name}, exit code {self.codes[name]}; {self.log(name)} ends with:", file=sys.stderr)
            print("\n".join(f"    {line}" for line in last), file=sys.stderr)


def parse_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Ours, and those for the runs."""
    parser = parser_of(__doc__, runs_dir=False)
    parser.add_argument("plan", type=Path, help="the experiment's YAML file")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: the plan's")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="default: all of the plan")
    parser.add_argument("--with", dest="given", nargs="+", default=[], metavar="NAME=VALUE", help="for ${NAME}")
    parser.add_argument("--steps", type=int, help="optimizer steps of each run; default: the plan's")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (1)")
    parser.add_argument("--runs_dir", type=Path, help="where the run folders are (runs/NAME-OF-THE-PLAN)")
    parser.add_argument("--cache_dir", type=Path, default=Path("runs/cache"), help="where the demo is built")
    options, more = parser.parse_known_args(arguments)
    options.runs_dir = options.runs_dir or Path("runs") / options.plan.stem
    for key in ("plan", "runs_dir", "cache_dir"):  # the runs' working directory is the repository
        setattr(options, key, getattr(options, key).resolve())
    return options, [_absolute(word) for word in more]


def _absolute(word: str) -> str:
    """A relative path with a slash in it that is there, `student/export` or `--KEY=student/export`, from here."""
    key, equals, value = word.rpartition("=")
    return f"{key}{equals}{Path(value).resolve()}" if "/" in value and Path(value).exists() else word


def values_of(options: argparse.Namespace) -> dict[str, str]:
    """What `${NAME}` stands for; a path becomes absolute. Raises ValueError."""
    found = {"runs": str(options.runs_dir), "cache": str(options.cache_dir)}
    for word in options.given:
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"--with {word}: give NAME=VALUE")
        found[name] = str(Path(value).resolve()) if Path(value).exists() else value
    return found


def array_task(tasks: list[Task], index: str | None) -> list[Task]:
    """The one of a SLURM job array, or all. ValueError where the array is larger than the plan."""
    if index is None:
        return tasks
    if int(index) >= len(tasks):
        raise ValueError(f"SLURM_ARRAY_TASK_ID = {index}: there are {len(tasks)} runs; use --array=0-{len(tasks) - 1}")
    return [tasks[int(index)]]


def is_finished(run: Path, steps: int | None) -> bool:
    """Whether a run has done the steps that are asked for, or was ended by a limit of its own before them. ValueError
    where it has done more: it would not compare with the others."""
    summary = summary_of(run)
    if summary is None or steps is None or summary["steps"] == steps:
        return summary is not None
    if summary["steps"] > steps:
        raise ValueError(f"{run}: has done {summary['steps']} steps, {steps} are asked for; use another --runs_dir")
    return bool(summary.get("kl_limit_reached") or (summary.get("validation") or {}).get("stopped_early"))


def command(plan: Plan, task: Task, options: argparse.Namespace, words: Sequence[str]) -> list[str]:
    """One run; what the caller gave wins over the plan."""
    where = {
        "seed": task.seed,
        "name": task.name,
        "runs_dir": str(options.runs_dir),
        "cache_dir": str(options.cache_dir),
    }
    return [
        task.variant.program,
        *plan.arguments(task.variant, values_of(options), options.steps),
        *words,
        *flags(where),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """See the exit codes above."""
    options, more = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    return exit_code(lambda: run_all(options, more))


def run_all(options: argparse.Namespace, more: Sequence[str]) -> int:
    """All of the plan that is chosen and not finished. Raises ValueError where something is to be mended."""
    index = os.environ.get("SLURM_ARRAY_TASK_ID")
    plan = read_plan(options.plan)
    seeds = plan.seeds if options.seeds is None else options.seeds
    tasks = array_task([Task(variant, seed) for seed in seeds for variant in plan.chosen(options.only)], index)
    if options.jobs < 1:
        raise ValueError(f"--jobs = {options.jobs}: must be at least 1")
    pending = [
        task for task in tasks if not is_finished(options.runs_dir / task.name, plan.steps(task.variant, options.steps))
    ]
    commands = {task.name: command(plan, task, options, more) for task in pending}
    given = values_of(options)
    made = {Path(*filled([file], given)): filled(words, given) for file, words in plan.prepare.items()}
    for asked in plan.measures.values():  # settings of the runs may stand in these too
        filled(flags(asked, lists=True), {**flat(as_dict(RunConfig())), **given})
    print(f"{options.plan.stem}: {len(tasks)} runs, {len(tasks) - len(pending)} finished already", flush=True)
    runner = Runner(options.runs_dir / "logs", options.jobs)
    options.runs_dir.mkdir(parents=True, exist_ok=True)
    with locked(options.runs_dir / ".prepare.lock"):  # the tasks of an array may all come here at once
        done = runner.run({f"prepare-{f.parent.name}-{f.name}": words for f, words in made.items() if not f.exists()})
    done = done and runner.run(commands)
    try:
        if index is None and not runner.stopped:
            done = make_results(plan, options, runner) and done
    finally:
        runner.report()
    if runner.stopped:
        print("stopped; run the same command again to continue", file=sys.stderr)
        return STOPPED
    return 0 if done else 1


def make_results(plan: Plan, options: argparse.Namespace, runner: Runner) -> bool:
    """Measure what is not measured yet, write table and plot of all finished runs; whether nothing failed."""
    from eval.experiments.table import draw, page, read_table  # late: matplotlib and pandas take seconds

    runs: Path = options.runs_dir
    seeds = {*plan.seeds, *(options.seeds or [])}
    tasks = [Task(variant, seed) for variant in plan.variants for seed in sorted(seeds)]
    finished = [task for task in tasks if summary_of(runs / task.name)]
    if not finished:
        print(f"{runs}: no finished run of the plan, so no table", file=sys.stderr)
        return False
    measured = measure(plan, [runs / task.name for task in finished], options, runner)
    missing = [task.name for task in tasks if (runs / task.name).is_dir() and task not in finished]
    table = read_table(plan, finished, runs)
    text = page(plan, table, missing)
    write_atomically(runs / "results.md", text)
    write_atomically(runs / "results.png", draw(plan, table))
    print(f"\n{text}\ntable and plot: {runs}/results.md, results.png", flush=True)
    return measured


def measure(plan: Plan, runs: Sequence[Path], options: argparse.Namespace, runner: Runner) -> bool:
    """Every measure of the plan on the start, the export and the teacher of each run, where the model, the files or the
    options have changed since the last time."""
    known_file: Path = options.runs_dir / "measured.json"
    known = read_json(known_file) if known_file.is_file() else {}
    settings = yaml.safe_load((runs[0] / "config.yaml").read_text(encoding="utf-8"))
    given = {**flat(settings), **values_of(options)}
    models = list(dict.fromkeys(model for run in runs for model in models_of(run).values()))
    right = True
    for name, asked in plan.measures.items():
        words = filled(flags(asked, lists=True), given)
        state = {f"{name} {model}": _digest(model, words) for model in models}
        due = [model for model in models if known.get(f"{name} {model}") != state[f"{name} {model}"]]
        if not due:
            continue
        line = ["eval/measure.py", name, "--model", *due, *words, "--runs_dir", str(options.runs_dir)]
        if runner.run({f"measure-{name}": line}):
            known |= state
            write_atomically(known_file, json.dumps(known, indent=1) + "\n")
        else:
            right = False
    return right


def _digest(model: str, words: Sequence[str]) -> str:
    """Changes when the model, the options or a file that they name does."""
    files = [*sorted(Path(model).glob("*.safetensors")), *(Path(word.rpartition("=")[2]) for word in words)]
    times = [file.stat().st_mtime_ns for file in files if file.is_file()]
    return hashlib.sha256(json.dumps([list(words), times]).encode()).hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
