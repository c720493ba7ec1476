"""`serve_teacher.py --doctor`: where the teacher is, what it costs, whether its numbers are right. Then it ends.

One line for each fact or check; a check says PASS or FAIL. Collective: every rank runs it.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from configs.schema import TeacherConfig
from inference.packing import Group
from inference.scoring import Scorer
from inference.teacher import Teacher
from inference.wire import Request

TOLERANCE = {"float32": 2e-4, "bfloat16": 0.15}
"""Largest difference in log-probability, nats, between two ways of computing the same."""
_PROMPTS, _SAMPLES, _FACT_BYTES = 3, 4, 1024


def examine(config: TeacherConfig, scorer: Scorer, *, reference: bool) -> bool:
    """Print the lines on rank 0; true where every check passed. `reference`: compare with transformers as well."""
    teacher = scorer.teacher
    _say(f"model      {Path(config.path).resolve().name}: {teacher.architecture.family}, {config.dtype}, "
         f"{len(teacher.architecture.layers)} layers, vocabulary {teacher.vocab_size}, "
         f"tensor parallel {teacher.size}")  # fmt: skip
    for fact in _facts(teacher):
        _say(fact)
    groups = _groups(teacher)
    checks: list[tuple[str, Callable[[], tuple[bool, str]]]] = [
        ("weights", lambda: _weights_finite(teacher)),
        ("packed", lambda: _packed_is_plain(scorer, groups, config.dtype)),
        ("decoding", lambda: _greedy_is_likeliest(scorer, groups, config.dtype)),
    ]
    if reference:
        checks.append(("reference", lambda: _against_transformers(Path(config.path), scorer, groups, config.dtype)))
    passed = True
    for name, check in checks:
        good, text = check()
        _say(f"{name:10} {'PASS' if good else 'FAIL'} {text}")
        passed &= good
    _say(f"speed      {_speed(scorer, config)}")
    return passed


def _say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


def _facts(teacher: Teacher) -> list[str]:
    """Placement and memory of each rank; JSON in fixed-size tensors, so that nothing is pickled."""
    shard = sum(p.numel() * p.element_size() for p in teacher.model.parameters())
    mine = {
        "host": platform.node()[:200],
        "pid": os.getpid(),
        "device": str(teacher.device),
        "threads": torch.get_num_threads(),
        "shard": shard,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "on_device": torch.cuda.max_memory_allocated() if teacher.device.type == "cuda" else 0,
    }
    data = torch.zeros(_FACT_BYTES, dtype=torch.uint8)
    encoded = json.dumps(mine).encode()
    data[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
    everyone = [torch.zeros_like(data) for _ in range(teacher.size)]
    dist.all_gather(everyone, data)
    lines = []
    for rank, part in enumerate(everyone):
        fact = json.loads(bytes(part.tolist()).rstrip(b"\0"))
        on_device = f", {fact['on_device'] / 2**20:.0f} MiB on the device" if fact["on_device"] else ""
        lines.append(
            f"rank {rank:<5} {fact['host']}, process {fact['pid']}, {fact['device']}, {fact['threads']} threads, "
            f"shard {fact['shard'] / 2**20:.0f} MiB, peak memory {fact['peak'] / 2**20:.0f} MiB{on_device}"
        )
    return lines


def _groups(teacher: Teacher) -> tuple[Group, ...]:
    """The same random tokens on every rank: prompts and responses of different lengths, one of them a single token."""
    stream = torch.Generator().manual_seed(0)
    room = min(teacher.architecture.max_positions, 96)

    def some(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(teacher.vocab_size, (count,), generator=stream).tolist())

    groups = []
    for n in range(_PROMPTS):
        lengths = [1, *(max(1, room // 4 - 5 * i) for i in range(1, _SAMPLES))]
        groups.append(Group(some(max(1, room // 2 - 7 * n)), tuple(map(some, lengths)), n * _SAMPLES))
    return tuple(groups)


def _agree(good: bool) -> bool:
    """Whether it is good on every rank."""
    flag = torch.tensor([int(good)])
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def _weights_finite(teacher: Teacher) -> tuple[bool, str]:
    bad = [name for name, p in teacher.model.named_parameters() if not torch.isfinite(p).all()]
    good = _agree(not bad)
    return good, "all finite" if good else f"not finite: {', '.join(bad[:3]) or 'on another rank'}"


def _packed_is_plain(scorer: Scorer, groups: tuple[Group, ...], dtype: str) -> tuple[bool, str]:
    """A packed group against each response with a copy of the prompt, alone in its row."""
    packed = scorer.run(Request("score", groups))[0]
    plain = [scorer.run(Request("score", (Group(g.prompt, (r,)),)))[0] for g in groups for r in g.responses]
    return _compare(packed, torch.cat(plain), dtype, "tokens scored packed and one response at a time")


def _greedy_is_likeliest(scorer: Scorer, groups: tuple[Group, ...], dtype: str) -> tuple[bool, str]:
    """Decoding with the cache takes tokens that the forward pass without it finds likeliest."""
    prompts = tuple(Group(group.prompt, ()) for group in groups)
    count = min(8, scorer.teacher.architecture.max_positions - max(len(group.prompt) for group in groups))
    lengths, tokens = scorer.generate(Request("generate", prompts, 0.0, samples=1, max_new_tokens=count))
    answers = [tuple(part.tolist()) for part in tokens.split(lengths.tolist())]
    answered = tuple(Group(g.prompt, (a,), n) for n, (g, a) in enumerate(zip(groups, answers, strict=True)))
    best = scorer.run(Request("topk", answered, k=1))[0][:, 0]
    taken = scorer.run(Request("score", answered))[0]
    return _compare(taken, best, dtype, "tokens decoded greedily and the likeliest ones")


def _against_transformers(path: Path, scorer: Scorer, groups: tuple[Group, ...], dtype: str) -> tuple[bool, str]:
    """Rank 0 loads the whole model in transformers, float32, and runs plain rows; the others wait."""
    ours = scorer.run(Request("score", groups))[0]
    theirs = torch.zeros_like(ours)
    if dist.get_rank() == 0:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32).eval()
        parts = []
        with torch.no_grad():
            for group in groups:
                for response in group.responses:
                    logits = model(input_ids=torch.tensor([group.prompt + response])).logits
                    logprobs = logits[0, len(group.prompt) - 1 : -1].float().log_softmax(-1)
                    parts.append(logprobs.gather(1, torch.tensor(response)[:, None])[:, 0])
        theirs = torch.cat(parts)
    dist.broadcast(theirs, 0)
    return _compare(ours, theirs, dtype, "tokens here and in transformers")


def _compare(one: torch.Tensor, other: torch.Tensor, dtype: str, what: str) -> tuple[bool, str]:
    difference, tolerance = (one - other).abs().max().item(), TOLERANCE[dtype]
    # Not <= turned round: a NaN must fail.
    good = _agree(difference <= tolerance)
    return good, f"{len(one)} {what}: largest difference {difference:.1e} nats (allowed {tolerance:.1e})"


def _speed(scorer: Scorer, config: TeacherConfig, seconds: float = 3.0) -> str:
    """Packed tokens a second while scoring, after one round to warm up."""
    room = scorer.teacher.architecture.max_positions
    prompt, response = tuple([1] * min(256, room // 2)), tuple([1] * min(32, room // 4))
    groups = tuple(Group(prompt, (response,) * 8, 8 * n) for n in range(4))
    request = Request("score", groups)
    scorer.run(request)
    rounds, start = 0, time.monotonic()
    while _agree(time.monotonic() - start < seconds):
        scorer.run(request)
        rounds += 1
    elapsed = (time.monotonic() - start) / rounds
    tokens = sum(group.input_tokens for group in groups)
    return (
        f"{tokens / elapsed:.0f} packed tokens/s, {32 / elapsed:.1f} responses/s "
        f"({len(prompt)} prompt and {len(response)} response tokens, 8 to a prompt)"
    )
