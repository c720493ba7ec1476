"""What a checkpoint of a 135M student with its optimizer costs, beside dd writing the same bytes to the same disk.

    python tests/benchmarks/bench_checkpoint.py --folder DIR_ON_THE_DISK --rounds 7

SmolLM2-135M's shape in float32, random weights, one AdamW step taken, ZeRO 1, one rank. In turns: `dd ... conv=fsync`
of the files of a checkpoint, one after the other; a checkpoint (written, checksummed, forced to disk, verified, the one
before it deleted); the same in the background, of which the time that training stands still is measured. Goal: a
median of at most 1.3 times dd's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import torch
import transformers

from configs.schema import ActorConfig, CheckpointConfig
from tests.benchmarks.step_shared import CONFIG
from training.run.checkpoints import Checkpoints
from training.run.run_folder import Progress
from training.student.deepspeed_engine import Engine, Optimisation, start_distributed

GOAL = 1.3


def student() -> Engine:
    """The engine after one optimizer step."""
    torch.manual_seed(0)
    module = transformers.LlamaForCausalLM(CONFIG)
    engine = Engine(
        module, ActorConfig(), Optimisation(learning_rate=1e-6, total_steps=1, zero_stage=1, dtype="float32")
    )
    ids = torch.arange(3, 19)[None]
    _, _, applied = engine.update([lambda: {"loss": engine.engine(input_ids=ids, labels=ids).loss}], 0)
    assert applied
    return engine


def dd(files: list[Path], beside: Path) -> None:
    """Each file once more, forced to disk."""
    for number, file in enumerate(files):
        line = ["dd", f"if={file}", f"of={beside / str(number)}", "bs=4M", "conv=fsync", "status=none"]
        subprocess.run(line, check=True)


def timed(work: Callable[[], None]) -> float:
    """Seconds; nothing is left for the disk to do from before."""
    os.sync()
    started = time.monotonic()
    work()
    return time.monotonic() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where to write: the disk that is measured")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    start_distributed()
    engine, step = student(), 0
    seconds: dict[str, list[float]] = {"dd": [], "checkpoint": [], "background, training stands still": []}
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        base = Path(temporary)
        now = Checkpoints(base / "now" / "checkpoints", CheckpointConfig(keep=1))
        later = Checkpoints(base / "later" / "checkpoints", CheckpointConfig(keep=1, asynchronous=True))
        for checkpoints in (now, later):  # the first one also pays for memory that is touched for the first time
            checkpoints.save({"student": engine}, Progress(step=0))
            checkpoints.wait()
        for step in range(1, options.rounds + 1):
            files = [p for p in (now.directory / f"step-{step - 1:06d}").rglob("*") if p.is_file()]
            beside = base / "dd"
            beside.mkdir()
            seconds["dd"].append(timed(lambda files=files, beside=beside: dd(files, beside)))
            shutil.rmtree(beside)
            for checkpoints, name in ((now, "checkpoint"), (later, "background, training stands still")):
                progress = Progress(step=step)
                seconds[name].append(timed(lambda c=checkpoints, p=progress: c.save({"student": engine}, p)))
                checkpoints.wait()
        size = sum(p.stat().st_size for p in now.directory.rglob("*") if p.is_file())
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{size / 1e9:.2f} GB, {options.rounds} rounds, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    for name, values in seconds.items():
        spread = f"{min(values):.2f} to {max(values):.2f}"
        print(f"{name:36} {medians[name]:6.2f} s ({spread}), {medians[name] / medians['dd']:.2f} times dd")
    ratio = medians["checkpoint"] / medians["dd"]
    print(json.dumps({"ratio": round(ratio, 3), "goal": GOAL, "met": ratio <= GOAL}))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may hang at exit
