"""What slurm/ needs to know of a run before it starts its processes. Not for users: slurm/steps.sh calls it.

    python training/job.py [--prepare] training/main.py [ARGUMENT ...]

Prints three lines: the run's folder, its name, and the teacher's tensor-parallel size. With --prepare the teacher's
server is prepared as well: the demo is built where it is asked for, and RUN/job/teacher.yaml gets the `teacher` section
with the model's real path, for inference/serve_teacher.py. A mistake in the arguments ends with exit code 2.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import yaml

from configs.files import write_atomically
from configs.schema import DEMO, RunConfig, validate
from training.cli import DEMO_CONFIGS, demo_config, fail, parse

NAMES = {"pretrain.py": "pretrain", "sft.py": "sft"}
"""Scripts whose configuration is configs/demo/sft.yaml unless told otherwise, and the names of their runs."""


def main(argv: list[str]) -> int:
    """Parse as the script would, and print."""
    prepare = argv[:1] == ["--prepare"]
    script, *arguments = argv[1:] if prepare else argv
    stage = Path(script).name
    default = (lambda _: DEMO_CONFIGS / "sft.yaml") if stage in NAMES else demo_config
    config = parse(arguments, __doc__ or "", default)
    name = config.name or NAMES[stage] if stage in NAMES else config.run_name
    folder = (Path(config.runs_dir) / name).resolve()
    if prepare:
        try:
            validate(config)
            write_teacher(config, folder / "job" / "teacher.yaml")
        except (ValueError, OSError) as error:
            fail(" ".join(str(error).split()))
    print(folder, name, config.teacher.tensor_parallel, sep="\n", flush=True)
    return 0


def write_teacher(config: RunConfig, file: Path) -> None:
    """The `teacher` section for the server, its model where the trainer will find it too."""
    from training.demo import resolve_demo
    from training.preflight import model_directory

    demo = config.teacher.path == DEMO
    path = resolve_demo(config, stage=2).teacher.path if demo else model_directory("teacher.path", config.teacher.path)
    section = dataclasses.asdict(config.teacher) | {"path": str(Path(path).resolve()), "address": None}
    write_atomically(file, yaml.safe_dump({"teacher": section}))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
