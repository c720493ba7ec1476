"""Stage 1: supervised warm-up of the student on answers from the data or from the teacher.

    bash slurm/run_stage1_sft.sh
    deepspeed training/sft.py --config configs/demo/sft.yaml --sft.answers teacher

The trained model goes to --sft.output (default runs/NAME/export). Teacher answers are asked through its server and
kept in the cache folder, so that no question is asked twice. The same command again continues where the run stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from configs.io.loading import loading
from training.run.cli import leave, parse_supervised


def main(argv: list[str]) -> int:
    """Parse, check, train. Heavy libraries load only after the arguments are known to be good."""
    config = parse_supervised(argv, "Stage 1: supervised warm-up.", "sft")
    with loading():
        from training.supervised import learn_answers, read_questions, run_stage

    return run_stage(1, config, read_questions, learn_answers)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
