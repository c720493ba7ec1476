"""Scored responses a second: the packed teacher against transformers' forward over plain padded rows.

    python tests/benchmarks/bench_teacher.py [--threads 2] [--rounds 5] [--prompts 2]

Random weights in the shape of SmolLM2-135M, float32, on the CPU. Both sides run in one process, in turns, with the same
threads; then two tensor-parallel ranks with half the threads each. The median of the rounds counts. Last, the goals of
docs/benchmarks.md, each with PASS or FAIL; exit code 1 if one fails.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[0] = str(ROOT)

import torch
import torch.distributed as dist
import transformers

from inference.attention.packing import Group
from inference.model.scoring import Scorer
from inference.model.teacher import Teacher
from inference.protocol.wire import Request

SHAPE = transformers.LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)
WORK = {"400/32": (400, 32), "32/128": (32, 128)}
"""Prompt and response tokens."""
GROUP = 8
GOALS = {"400/32": 5.0, "32/128": 1.1}
PARALLEL_GOAL = 0.75
"""Heads divide by 3 but not by 2: two ranks have a model of 8 heads and 4 KV heads, and so has what they compare to."""


def groups_of_work(work: str, prompts: int) -> tuple[Group, ...]:
    prompt, response = WORK[work]
    stream = torch.Generator().manual_seed(0)

    def some(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(SHAPE.vocab_size, (count,), generator=stream).tolist())

    return tuple(Group(some(prompt), tuple(some(response) for _ in range(GROUP)), n * GROUP) for n in range(prompts))


@torch.no_grad()
def plain(model: Any, groups: tuple[Group, ...]) -> torch.Tensor:
    """float32 [S] log-probabilities of all response tokens, one padded row for each response, a group at a time."""
    out = []
    for group in groups:
        ids = torch.tensor([group.prompt + response for response in group.responses])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        start = len(group.prompt)
        logprobs = logits[:, start - 1 : -1].float().log_softmax(-1)
        out.append(logprobs.gather(-1, ids[:, start:, None])[..., 0].reshape(-1))
    return torch.cat(out)


def flop(groups: tuple[Group, ...], config: Any) -> float:
    """Of the packed forward: linear layers at every input, logits at every response token, attention pairs."""
    head = config.hidden_size // config.num_attention_heads
    attention = config.hidden_size**2 * 2 + 2 * config.hidden_size * config.num_key_value_heads * head
    layer = attention + 3 * config.hidden_size * config.intermediate_size
    total = 0.0
    for group in groups:
        P, lengths = len(group.prompt), [len(r) for r in group.responses]
        pairs = P * P / 2 + sum((n - 1) * (P + n / 2) for n in lengths)
        total += 2 * group.input_tokens * layer * config.num_hidden_layers
        total += 2 * sum(lengths) * config.vocab_size * config.hidden_size
        total += 4 * pairs * config.hidden_size * config.num_hidden_layers
    return total


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def matrix_gflops(rows: int, inner: int, columns: int) -> float:
    """Of one product of this shape."""
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    best = min(seconds(lambda: a @ b) for _ in range(10))
    return 2 * rows * inner * columns / best / 1e9


def start_group(rank: int, size: int, port: int) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.TCPStore("127.0.0.1", port, size, rank == 0, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def ranks_main(options: argparse.Namespace) -> None:
    """One rank of the tensor-parallel comparison: prints seconds of each round on rank 0."""
    start_group(options.rank, options.size, options.port)
    scorer = Scorer(Teacher(options.model, "float32"), max_batch_tokens=16384, logit_chunk=1024)
    request = Request("score", groups_of_work("400/32", options.prompts))
    scorer.score(request)
    times = [seconds(lambda: scorer.score(request)) for _ in range(options.rounds)]
    dist.barrier()
    if options.rank == 0:
        print(statistics.median(times), flush=True)
    os._exit(0)


def parallel_seconds(model: Path, size: int, options: argparse.Namespace) -> float:
    port = free_port()
    command = [sys.executable, str(Path(__file__).resolve()), "--model", str(model), "--size", str(size)]
    command += ["--port", str(port), "--threads", str(max(1, options.threads // size)), "--rounds", str(options.rounds)]
    command += ["--prompts", str(options.prompts)]
    ranks = [
        subprocess.Popen(
            [*command, "--rank", str(rank)],
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": str(max(1, options.threads // size))},
        )
        for rank in range(size)
    ]
    return float(ranks[0].communicate()[0].split()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=2, help="groups of 8 responses in a request")
    for name, kind in (("model", Path), ("rank", int), ("size", int), ("port", int)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.rank is not None:
        ranks_main(options)
    start_group(0, 1, free_port())
    square, skinny = matrix_gflops(2048, 2048, 2048), matrix_gflops(656, 576, 1536)
    print(f"{options.threads} threads; products: 2048^3 {square:.0f} GFLOP/s, 656 x 576 x 1536 {skinny:.0f} GFLOP/s")
    torch.manual_seed(0)
    passed = []
    with tempfile.TemporaryDirectory() as folder:
        model = transformers.LlamaForCausalLM(SHAPE).eval()
        model.save_pretrained(folder)
        scorer = Scorer(Teacher(Path(folder), "float32"), max_batch_tokens=16384, logit_chunk=1024)
        for work, goal in GOALS.items():
            passed.append(compare(work, goal, model, scorer, options))
    del model, scorer
    with tempfile.TemporaryDirectory() as folder:
        even = transformers.LlamaConfig(**{**SHAPE.to_dict(), "num_attention_heads": 8, "num_key_value_heads": 4,
                                           "head_dim": 72})  # fmt: skip
        transformers.LlamaForCausalLM(even).save_pretrained(folder)
        one, two = (parallel_seconds(Path(folder), size, options) for size in (1, 2))
        good = one / two >= PARALLEL_GOAL
        passed.append(good)
        print(
            f"400/32, 8 heads: 1 rank x {options.threads} threads {one:.2f} s, 2 ranks x {options.threads // 2} "
            f"{two:.2f} s: {one / two:.2f} of its speed, goal {PARALLEL_GOAL} {'PASS' if good else 'FAIL'}"
        )
    return 0 if all(passed) else 1


def compare(work: str, goal: float, model: Any, scorer: Scorer, options: argparse.Namespace) -> bool:
    """Both sides on the same responses, in turns; first that they say the same."""
    groups = groups_of_work(work, options.prompts)
    request = Request("score", groups)
    difference = (plain(model, groups) - scorer.score(request)[0]).abs().max().item()
    assert difference < 1e-3, f"log-probabilities differ by {difference}"
    theirs, ours = [], []
    for _ in range(options.rounds):
        theirs.append(seconds(lambda: plain(model, groups)))
        ours.append(seconds(lambda: scorer.score(request)))
    their, our = statistics.median(theirs), statistics.median(ours)
    responses = options.prompts * GROUP
    print(f"{work}: transformers {responses / their:.2f} responses/s ({their:.2f} s), ours {responses / our:.2f} "
          f"({our:.2f} s, {flop(groups, SHAPE) / our / 1e9:.0f} GFLOP/s): {their / our:.2f} times, goal {goal} "
          f"{'PASS' if their / our >= goal else 'FAIL'}; largest difference {difference:.1e} nats")  # fmt: skip
    return their / our >= goal


if __name__ == "__main__":
    sys.exit(main())
