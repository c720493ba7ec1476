"""Seconds of one GRPO step of ours over group size, prompt and response tokens, and a plot of them.

    python tests/benchmarks/bench_growth.py [--plot docs/images/step-growth.png] [--rounds 3] [--threads 1]

A small Llama with random weights, one prompt a step, every response as long as it may be, KL to a reference; the
teacher's server is a process of its own. One of the three grows at a time, the others stay at 8 responses, 64 prompt
tokens and 64 response tokens. Medians; the first step at each point is not counted. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE)

import matplotlib.pyplot as plt
import step_ours
import step_shared as shared
import torch

GROWS = {
    "group size": (2, 4, 8, 16, 32),
    "prompt tokens": (64, 256, 512, 1024, 2048),
    "response tokens": (32, 64, 128, 256, 512),
}
REST = {"group size": 8, "prompt tokens": 64, "response tokens": 64}
PHASES = {"sample": ("prefill", "decode"), "score": ("teacher", "reference"), "update": ("update",)}


def small_models(folder: Path) -> None:
    """Student and teacher whose largest step takes seconds on one core."""
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4}
    others = {"num_key_value_heads": 2, "max_position_embeddings": 4096, "vocab_size": 8192}
    for name, value in {**sizes, **others}.items():
        setattr(shared.CONFIG, name, value)
    shared.CONFIG.head_dim = 64
    shared.build_models(folder)


def measure(step: step_ours.OneStep, point: dict[str, int], rounds: int) -> dict[str, float]:
    """Median seconds of each phase."""
    sampling = replace(
        step.config.sampling, group_size=point["group size"], max_new_tokens=point["response tokens"]
    )  # fmt: skip
    step.config = step.actor._config = replace(step.config, sampling=sampling)
    stream, found = torch.Generator().manual_seed(0), []
    for number in range(rounds + 1):
        prompt = torch.randint(3, shared.CONFIG.vocab_size, (point["prompt tokens"],), generator=stream).tolist()
        timed = step.run([tuple(prompt)], number)
        found.append({name: sum(timed[part] for part in parts) for name, parts in PHASES.items()})
    return {name: statistics.median(one[name] for one in found[1:]) for name in PHASES}


def plot(found: dict[str, list[dict[str, float]]], path: Path) -> None:
    """A panel for each thing that grows, phases on top of each other."""
    figure, panels = plt.subplots(1, len(GROWS), figsize=(13, 4), layout="constrained")
    for panel, (name, values) in zip(panels, GROWS.items(), strict=True):
        panel.stackplot(
            values, *([one[phase] for one in found[name]] for phase in PHASES), labels=list(PHASES), alpha=0.7
        )
        panel.plot(values, [sum(one.values()) for one in found[name]], "ko-", markersize=4, label="step")
        panel.set(xlabel=name, ylabel="seconds a step", xlim=(0, values[-1]), ylim=(0, None))
    panels[0].legend(loc="upper left")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, default=Path("docs/images/step-growth.png"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    step_ours.start_distributed()
    found: dict[str, list[dict[str, float]]] = {}
    print("| | sample, s | score, s | update, s | step, s |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        small_models(Path(folder))
        setting = {"models": folder, "shape": "32/128", "dtype": "float32", "threads": options.threads, "rival": "grpo"}
        step = step_ours.OneStep(argparse.Namespace(**setting), stack)
        for name, values in GROWS.items():
            found[name] = []
            for value in values:
                one = measure(step, {**REST, name: value}, options.rounds)
                found[name].append(one)
                cells = " | ".join(f"{seconds:.2f}" for seconds in (*one.values(), sum(one.values())))
                print(f"| {value} {name} | {cells} |", flush=True)
    plot(found, options.plot)


if __name__ == "__main__":
    main()
