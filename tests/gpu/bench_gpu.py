"""Speed, memory and model FLOPs utilisation of each phase on one GPU, as a Markdown table.

    bash tests/gpu/run.sh [TABLE.md]                                  everything, the tests first
    python tests/gpu/bench_gpu.py --out TABLE.md                      this alone, on CUDA
    python tests/gpu/bench_gpu.py --out TABLE.md --device cpu --tiny  a dry run: the numbers mean nothing

Models have the shapes of tests/gpu/bench_shapes.py and random weights in bfloat16; G = 8; each model is a process
(tests/gpu/bench_worker.py) with a time limit. MFU is the model FLOPs of the tokens that were really computed (grouped
rows compute fewer than plain ones for the same work, so compare their seconds) over time and the device's peak: from
a table of data sheets, else what a large product reaches here. What does not fit is left out with a line; what fails
is a line with its error, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    # Some packages install their own tests under this name, which would win over a folder without __init__.py.
    sys.modules["tests"] = types.ModuleType("tests")
    sys.modules["tests"].__path__ = [str(ROOT / "tests")]

from tests.gpu import bench_shapes as shapes

BEGAN = time.monotonic()
"""Before torch is imported, which takes a while on a cold machine and counts too."""
MARK = "MEASURED "


@dataclass(frozen=True)
class Job:
    """One process."""

    model: str
    limit_s: float


def jobs(tiny: bool) -> list[Job]:
    """In order of what matters, because the time may run out."""
    if tiny:
        return [Job(name, 120) for name in shapes.TINY_MODELS]
    small, middle, large = shapes.MODELS
    return [Job(middle, 110), Job(large, 110), Job(small, 110)]


def run(job: Job, options: argparse.Namespace, limit_s: float) -> list[dict[str, Any]]:
    """What the process measured, as far as it came."""
    command = [sys.executable, str(HERE / "bench_worker.py"), "--model", job.model]
    command += ["--device", options.device, "--prompts", str(options.prompts), *(["--tiny"] if options.tiny else [])]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1", **hidden}
    )
    assert process.stdout is not None
    late = threading.Event()

    def end() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(limit_s, end)
    timer.start()
    found: list[dict[str, Any]] = []
    try:
        for line in process.stdout:
            if line.startswith(MARK):
                found.append(json.loads(line.removeprefix(MARK)))
        code = process.wait()
    finally:
        timer.cancel()
    failure = {"model": job.model, "phase": "all", "tokens": "", "variant": ""}
    if late.is_set():
        found.append({**failure, "error": f"not done after {limit_s:.0f} s; what was measured until then is above"})
    elif code != 0:
        found.append({**failure, "error": f"exit code {code}; its last words are in the log"})
    return found


def product_peak(device: str) -> float:
    """FLOP/s of a large bfloat16 product here."""
    import torch

    size = 8192 if device == "cuda" else 256
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / fastest(device, lambda: a @ b)


def memory_peak(device: str) -> float:
    """Bytes a second of a large sum, which only reads."""
    import torch

    numbers = torch.ones(1 << (31 if device == "cuda" else 22), device=device, dtype=torch.bfloat16)
    return 2 * len(numbers) / fastest(device, lambda: numbers.sum())


def fastest(device: str, work: Callable[[], object]) -> float:
    """Least seconds of ten rounds."""
    import torch

    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def give_back(device: str) -> None:
    """What this process has cached belongs to the workers: 4 GB decide whether a model fits."""
    import torch

    if device == "cuda":
        torch.cuda.empty_cache()


def version(package: str) -> str:
    """Installed version."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {package}"


def heading(options: argparse.Namespace, product: float, memory: float) -> tuple[str, float]:
    """What it was measured on and with, and the peak that MFU is taken of."""
    import torch

    name, driver = "CPU, a dry run: the numbers mean nothing", ""
    if options.device == "cuda":
        name = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = ", driver " + subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
        except OSError:
            driver = ", driver unknown"
    known = shapes.known_peak(name)
    peak, source = known or (product, "the product measured here")
    packages = ", ".join(version(p) for p in ("deepspeed", "transformers", "megatron-core", "flash-attn"))
    lines = [
        f"{name}{driver}; torch {torch.__version__} (CUDA {torch.version.cuda}), {packages}.",
        f"bfloat16, G = {shapes.GROUP}, {options.prompts} prompts. MFU of {peak / 1e12:.3g} TFLOP/s ({source}); a "
        f"large product reaches {product / 1e12:.3g} TFLOP/s, reading memory {memory / 1e12:.3g} TB/s. Floors: the",
        "matrix products alone at the one, the bytes of weights and cache alone at the other. Kernels and waits (the",
        "host for the device) are of one call; of decoding, of one step (a token of every response).",
    ]
    return "\n".join(lines), peak


def table(rows: list[dict[str, Any]], peak: float, product: float, memory: float) -> list[str]:
    """A line for each measurement, then what was left out, then what failed."""
    names = ("model", "prompt/response", "phase", "variant", "seconds", "rounds", "tokens/s", "floor: products",
             "floor: bytes", "MFU", "kernels", "waits", "peak GB")  # fmt: skip
    lines = [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]
    for row in rows:
        if "seconds" not in row:
            continue
        seconds, held = max(row["seconds"], 1e-9), row["memory_gb"]
        lines.append(
            f"| {row['model']} | {row['tokens']} | {row['phase']} | {row['variant']} | {seconds:.4g} | {row['rounds']} "
            f"| {row['count'] / seconds:,.0f} | {row['flops'] / product:.3g} | {row['bytes'] / memory:.3g} "
            f"| {100 * row['flops'] / seconds / peak:.1f} % | {row['kernels']} | {row['waits']} "
            f"| {'' if held is None else f'{held:.1f}'} |"
        )
    for kind, title in (("note", "Left out:"), ("error", "FAILED:")):
        told = [row for row in rows if kind in row]
        if told:
            lines += ["", title, ""]
            lines += [
                f"- {row['model']}, {row['phase']} {row['tokens']} {row['variant']}".rstrip() + f": {row[kind]}"
                for row in told
            ]
    return lines


def main() -> int:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file that the table is added to")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models and few tokens")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=300.0, help="time for all processes together")
    options = parser.parse_args()
    ends = BEGAN + options.seconds
    product, memory = product_peak(options.device), memory_peak(options.device)
    give_back(options.device)
    text, peak = heading(options, product, memory)
    rows: list[dict[str, Any]] = []
    before = options.out.read_text(encoding="utf-8") if options.out.exists() else ""
    page = ""
    for job in jobs(options.tiny):
        left = ends - time.monotonic()
        if left < 10:
            skipped = {"model": job.model, "phase": "all", "tokens": "", "variant": ""}
            rows.append({**skipped, "error": f"not started: the {options.seconds:.0f} s for all were used up"})
        else:
            print(f"bench_gpu: {job.model} ...", file=sys.stderr, flush=True)
            rows += run(job, options, min(job.limit_s, left))
        page = "\n".join(["## Phases", "", text, "", *table(rows, peak, product, memory), ""])
        options.out.write_text(before + page + "\n", encoding="utf-8")  # each time: whoever ends us loses one job
    failed = any("error" in row for row in rows)
    print(page, flush=True)
    return 1 if failed or not any("seconds" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
