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

MARK = "MEASURED "


@dataclass(frozen=True)
class Job:
    """One process."""

    model: str
    part: str
    limit_s: float


def jobs(tiny: bool) -> list[Job]:
    """In order of what matters, because the time may run out."""
    if tiny:
        first, second = shapes.TINY_MODELS
        return [
            Job(first, "models", 90), Job(second, "models", 90), Job(first, "generate", 60), Job(first, "injected", 60)
        ]  # fmt: skip
    small, middle, large = shapes.MODELS
    return [
        Job(middle, "models", 110), Job(small, "models", 110), Job(large, "models", 100), Job(middle, "generate", 50),
        Job(small, "generate", 50), Job(middle, "injected", 150),
    ]  # fmt: skip


def run(job: Job, options: argparse.Namespace, limit_s: float) -> list[dict[str, Any]]:
    """What the process measured, as far as it came."""
    command = [sys.executable, str(HERE / "bench_worker.py"), "--model", job.model, "--part", job.part]
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
    failure = {"model": job.model, "phase": job.part, "tokens": "", "variant": ""}
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

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    best = float("inf")
    for _ in range(10):
        wait()
        start = time.perf_counter()
        a @ b
        wait()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def version(package: str) -> str:
    """Installed version."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {package}"


def heading(options: argparse.Namespace, product: float) -> tuple[str, float]:
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
        f"large product reaches {product / 1e12:.3g} TFLOP/s.",
    ]
    return "\n".join(lines), peak


def table(rows: list[dict[str, Any]], peak: float) -> list[str]:
    """A line for each measurement, then what was left out, then what failed."""
    lines = [
        "| model | prompt/response | phase | variant | seconds | rounds | tokens/s | peak GB | MFU |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if "seconds" not in row:
            continue
        seconds, memory = max(row["seconds"], 1e-9), row["memory_gb"]
        lines.append(
            f"| {row['model']} | {row['tokens']} | {row['phase']} | {row['variant']} | {seconds:.4g} | {row['rounds']} "
            f"| {row['count'] / seconds:,.0f} | {'' if memory is None else f'{memory:.1f}'} "
            f"| {100 * row['flops'] / seconds / peak:.1f} % |"
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
    product = product_peak(options.device)
    text, peak = heading(options, product)
    rows: list[dict[str, Any]] = []
    ends = time.monotonic() + options.seconds
    for job in jobs(options.tiny):
        left = ends - time.monotonic()
        if left < 10:
            skipped = {"model": job.model, "phase": job.part, "tokens": "", "variant": ""}
            rows.append({**skipped, "error": f"not started: the {options.seconds:.0f} s for all were used up"})
            continue
        print(f"bench_gpu: {job.model}, {job.part} ...", file=sys.stderr, flush=True)
        rows += run(job, options, min(job.limit_s, left))
    failed = any("error" in row for row in rows)
    page = "\n".join(["## Phases", "", text, "", *table(rows, peak), ""])
    with options.out.open("a", encoding="utf-8") as file:
        file.write(page + "\n")
    print(page, flush=True)
    return 1 if failed or not any("seconds" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
