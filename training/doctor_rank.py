"""One rank of the world that `training/main.py --doctor` compares itself with: the same first step, metrics to a file.

python training/doctor_rank.py FOLDER      (holds config.yaml; RANK, WORLD_SIZE and the rest are set)
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from training.cli import load_config
from training.distributed import barrier, is_main
from training.doctor import admit
from training.run import Setup, prepare, quiet_logging
from training.run_folder import RunFolder
from training.stopping import StopRequest


def main(folder: Path) -> None:
    """Take the step; rank 0 writes metrics.json."""
    quiet_logging()
    config, facts, inputs = prepare(load_config(folder / "config.yaml"))
    with ExitStack() as stack:
        patient = admit(Setup(config, inputs, facts, RunFolder(folder), StopRequest()), stack)
        if is_main():
            (folder / "metrics.json").write_text(json.dumps(dict(patient.metrics)))
        barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # no library's exit hook may hang
