"""Stage 2: a student learns from a teacher by reinforcement learning.

    bash slurm/run_stage2_grpo.sh
    deepspeed training/main.py --algo ppo --reward minillm
    deepspeed --num_gpus 2 training/main.py --config my.yaml --actor.learning_rate 2e-6

    python training/main.py --plan --config my.yaml      what it needs: memory, cards (docs/planning.md)
    python training/main.py --doctor --config my.yaml    whether its numbers are right
    bash slurm/submit.sh stage2_grpo --doctor --cluster  whether the nodes of a job can work together

Without --config it runs the embedded Faroese demo (configs/demo/ALGO_REWARD.yaml). The same command again continues
where the run stopped. Exit codes: 0 finished, 2 a mistake in the input, 75 stopped with a checkpoint (run it again).
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from configs.io.loading import loading
from training.run.cli import TOOLS, demo_config, fail, leave, parse


def main(argv: list[str]) -> int:
    """Parse, check, run. Heavy libraries load only after the arguments are known to be good."""
    config = parse(argv, "Stage 2: reinforcement learning from a teacher.", demo_config, TOOLS)
    try:
        from configs.checks import validate

        validate(config)
        if "--plan" in argv:
            from training.tools.plan import plan

            return plan(config)
        if "--cluster" in argv:
            from training.tools.cluster import cluster

            return cluster(config)
    except ValueError as error:
        fail(str(error))
    if "--doctor" in argv:
        from training.tools.doctor import doctor

        return doctor(config)
    with loading():
        from training.stage2 import run

    return run(config)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
