"""What slurm/ needs to know of a run before it starts its processes. Not for users: slurm/steps.sh calls it.

    python training/run/job.py [--prepare] training/main.py [ARGUMENT ...]

Prints three lines: the run's folder, its name, and the teacher's tensor-parallel size. With --prepare the teacher's
server is prepared as well: the demo is built where it is asked for, and RUN/job/teacher.yaml gets the `teacher` section
with the model's real path, for inference/serve_teacher.py. A mistake in the arguments ends with exit code 2.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import yaml

from configs.checks import validate
from configs.io.claims import in_use
from configs.io.files import write_atomically
from configs.io.hub import as_started
from configs.schema import DEMO, RunConfig
from training.run.cli import TOOLS, demo_config, fail, parse, parse_supervised

SUPERVISED = ("pretrain", "sft")
"""Stages 0 and 1: their scripts, and the names of their runs."""


def main(argv: list[str]) -> int:
    """Parse as the script would, and print."""
    prepare = argv[:1] == ["--prepare"]
    script, *arguments = argv[1:] if prepare else argv
    stage, description = Path(script).stem, __doc__ or ""
    if stage in SUPERVISED:
        config = parse_supervised(arguments, description, stage)
    else:
        config = parse(arguments, description, demo_config, TOOLS)
    folder = (Path(config.runs_dir) / config.run_name).resolve()
    try:
        validate(config)
        if (problem := in_use(folder)) is not None:
            raise ValueError(problem)
        if prepare:
            write_teacher(config, folder / "job" / "teacher.yaml")
    except (ValueError, OSError) as error:
        fail(str(error))
    print(folder, config.run_name, config.teacher.tensor_parallel, sep="\n", flush=True)
    return 0


def write_teacher(config: RunConfig, file: Path) -> None:
    """The `teacher` section for the server, its model where the trainer will find it too."""
    from inference.model.files import model_directory
    from training.data.demo.resolve import resolve_demo

    teacher = config.teacher
    if teacher.path == DEMO:
        path = Path(resolve_demo(config, stage=2).teacher.path)
    else:
        known = as_started(file.parents[1], "teacher.path", teacher.path)
        path = model_directory("teacher.path", known, weights=teacher.url is None)
    section = dataclasses.asdict(teacher) | {"path": str(path.resolve()), "address": None}
    write_atomically(file, yaml.safe_dump({"teacher": section}))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
