"""Are the teacher's numbers right? `against_transformers` at every start; `serve_teacher.py --doctor` asks more, says
where it is and what it costs, and ends: one line for each fact or check, PASS or FAIL. Collective: every rank runs it.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from configs.schema import TeacherConfig
from inference.attention.packing import Group
from inference.model.backend import Backend
from inference.model.rounding import rounded_down
from inference.protocol.replies import TeacherInfo
from inference.protocol.wire import Request

ALLOWED, NOISE = 1e-3, 3.0
"""Mean difference of a log-probability between two ways of computing the same, nats, or times what rounding does to
this model in its type."""
SMALL = 2 << 30
"""Bytes in float32 up to which all layers of a model are compared at the start."""
SENTENCES = (
    "Hvat eitur høvuðsstaðurin í Føroyum? Hann eitur Tórshavn og liggur á Streymoy, sum er størsta oyggin.",
    "What is the capital of the Faroe Islands? It is called Tórshavn, and some 14,000 people live there.",
)
_PROMPTS, _SAMPLES = 3, 4
Verdict = tuple[bool, str]


def examine(config: TeacherConfig, backend: Backend, *, reference: bool) -> bool:
    """Print the lines on rank 0; true where every check passed. `reference`: compare with transformers as well."""
    info = backend.info
    _say(
        f"model      {info.model}: {config.backend}, {info.dtype}, vocabulary {info.vocab_size}, "
        f"tensor parallel {config.tensor_parallel}"
    )
    _facts(backend)
    groups = _groups(backend)
    passed = [
        _report("weights", _weights_finite(backend)),
        _report("packed", _packed_is_plain(backend, groups)),
        _report("decoding", _greedy_is_likeliest(backend, groups)),
    ]
    if reference:
        passed.append(_report("reference", against_transformers(config, backend, whole=True)))
    _say(f"speed      {_speed(backend)}")
    return all(passed)


def _say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


def _report(name: str, verdict: Verdict) -> bool:
    good, text = verdict
    _say(f"{name:10} {'PASS' if good else 'FAIL'} {text}")
    return good


def _facts(backend: Backend) -> None:
    """Each rank prints its placement and memory, in order of rank."""
    parameters = [parameter for _, parameter in backend.parameters()]
    shard = sum(p.numel() * p.element_size() for p in parameters)
    device = parameters[0].device if parameters else torch.device("cpu")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    on_device = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    place = f"{platform.node()}, process {os.getpid()}, {device}, {torch.get_num_threads()} threads"
    memory = f"shard {shard / 2**20:.0f} MiB, peak memory {peak / 2**20:.0f} MiB"
    memory += f", {on_device / 2**20:.0f} MiB on the device" if on_device else ""
    for rank in range(dist.get_world_size()):
        if rank == dist.get_rank():
            print(f"rank {rank:<5} {place}, {memory}", flush=True)
        dist.barrier()


def _groups(backend: Backend) -> tuple[Group, ...]:
    """The same random tokens on every rank: prompts and responses of different lengths, one of them a single token."""
    stream = torch.Generator().manual_seed(0)
    room = min(backend.info.max_positions, 96)

    def some(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(backend.info.vocab_size, (count,), generator=stream).tolist())

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


def _weights_finite(backend: Backend) -> Verdict:
    bad = [name for name, p in backend.parameters() if not torch.isfinite(p).all()]
    good = _agree(not bad)
    return good, "all finite" if good else f"not finite: {', '.join(bad[:3]) or 'on another rank'}"


def _packed_is_plain(backend: Backend, groups: tuple[Group, ...]) -> Verdict:
    """A packed group against each response with a copy of the prompt, alone in its row."""
    (packed,) = backend.score(Request("score", groups))
    plain = [backend.score(Request("score", (Group(g.prompt, (r,)),)))[0] for g in groups for r in g.responses]
    allowed = max(ALLOWED, NOISE * _rounding(backend, Request("score", groups), packed))
    return _compare(packed, torch.cat(plain), "tokens scored packed and one response at a time", allowed)


def _rounding(backend: Backend, request: Request, scored_S: torch.Tensor) -> float:
    """Mean change, nats a token, where half of the numbers of the embedding, always the same, go down by one."""
    embedding = next((weight.detach() for _, weight in backend.parameters() if weight.dim() == 2), None)
    if embedding is None:  # a model elsewhere
        return 0.0
    kept = embedding.clone()
    embedding.copy_(rounded_down(kept))
    changed = (backend.score(request)[0] - scored_S).abs().mean()
    embedding.copy_(kept)
    return float(changed.nan_to_num())


def _greedy_is_likeliest(backend: Backend, groups: tuple[Group, ...]) -> Verdict:
    """Decoding with the cache takes tokens that no other token beats in the forward pass without it."""
    if not hasattr(backend, "topk"):
        return True, "not checked: this backend has no topk"
    count = min(8, backend.info.max_positions - max(len(group.prompt) for group in groups))
    prompts = tuple(Group(group.prompt, ()) for group in groups)
    lengths, tokens = backend.answer(Request("answer", prompts, temperature=0.0, max_new_tokens=count))
    answers = [tuple(part.tolist()) for part in tokens.split(lengths.tolist())]
    answered = tuple(Group(g.prompt, (a,), n) for n, (g, a) in enumerate(zip(groups, answers, strict=True)))
    best = backend.topk(Request("topk", answered, k=1))[0][:, 0]
    (taken,) = backend.score(Request("score", answered))
    allowed = max(ALLOWED, NOISE * _rounding(backend, Request("score", answered), taken))
    return _compare(taken, best, "tokens decoded greedily and the likeliest ones", allowed)


def against_transformers(config: TeacherConfig, backend: Any, *, whole: bool = False) -> Verdict:
    """A few sentences here and in transformers, float32: mean difference of a log-probability over their tokens. Rank 0
    reads the model once more, the others wait.

    A model over SMALL bytes is compared by its first layers with the final norm and the output layer, unless `whole`:
    as many as show each kind of its attention. Allowed is ALLOWED, or NOISE times what the backend's type does to
    transformers itself. A backend without `first_layers` is not compared: transformers itself, or a model elsewhere.
    """
    if not hasattr(backend, "first_layers"):
        return True, f"not compared: nothing but the {config.backend} backend runs it here"
    began, groups, count = time.monotonic(), _sentences(backend.info, Path(config.path)), len(backend.layers)
    size = 4 * dist.get_world_size() * sum(parameter.numel() for _, parameter in backend.parameters())
    kinds = set(backend.layers)
    few = next(n for n in range(min(2, count), count + 1) if set(backend.layers[:n]) == kinds)
    layers = count if whole or size <= SMALL else few
    with backend.first_layers(layers):
        (ours_S,) = backend.score(Request("score", groups))
    found, failed = torch.full((2,), torch.nan, dtype=torch.float64), ""
    if dist.get_rank() == 0:
        try:
            found = torch.tensor(_gap(config, groups, layers, ours_S), dtype=torch.float64)
        except Exception as error:  # transformers raises many kinds
            failed = f" ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    dist.broadcast(found, 0)
    (gap, allowed), part = found.tolist(), f"all {count}" if layers == count else f"the first {layers} of {count}"
    return gap <= allowed, (  # false for NaN
        f"log-probabilities of {len(ours_S)} tokens are {gap:.1e} nats from transformers' own (allowed {allowed:.1e})"
        f"{failed}; {part} layers, final norm and output layer; {time.monotonic() - began:.1f} s"
    )


def _sentences(info: TeacherInfo, path: Path) -> tuple[Group, ...]:
    """SENTENCES as tokenizer.json cuts them, each begun once and continued twice; where it is not there or knows few of
    their words, made-up tokens."""
    rows = [tuple(range(1 + n, info.vocab_size, info.vocab_size // 24 + 1)) for n in range(2)]
    with contextlib.suppress(Exception):  # `tokenizers` has no kind of its own
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        found = [tuple(t for t in tokenizer.encode(text).ids if t < info.vocab_size) for text in SENTENCES]
        rows = found if min(map(len, found)) >= 8 else rows
    cut = [row[: min(28, info.max_positions - 1)] for row in rows]
    halves = [(row[: len(row) // 2], row[len(row) // 2 :]) for row in cut]
    return tuple(Group(begun, (rest, rest[:0:-3]), 2 * n) for n, (begun, rest) in enumerate(halves))


def _gap(config: TeacherConfig, groups: tuple[Group, ...], layers: int, ours_S: torch.Tensor) -> tuple[float, float]:
    """Mean difference from transformers in float32, and what is allowed: only where ALLOWED does not do, transformers
    is asked again in the teacher's type, in longer rows."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    threads = torch.get_num_threads()
    if torch.cuda.is_available():  # the processors are idle
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    described = AutoConfig.from_pretrained(config.path)
    if quantised := getattr(described, "quantization_config", None):
        quantised["dequantize"] = True  # block FP8, as it is read here; with a GPU there it would want to compute in it
    text = described.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    model = AutoModelForCausalLM.from_pretrained(config.path, config=described, dtype=torch.float32).eval()
    theirs_S = _own_logprobs(model, groups)
    gap, allowed = float((ours_S - theirs_S).abs().mean()), ALLOWED
    if gap > ALLOWED:
        rounded_S = _own_logprobs(model.to(getattr(torch, config.dtype)), groups, longer=1)
        allowed = max(ALLOWED, NOISE * float((rounded_S - theirs_S).abs().mean()))
    torch.set_num_threads(threads)
    return gap, allowed


@torch.no_grad()
def _own_logprobs(model: Any, groups: tuple[Group, ...], longer: int = 0) -> torch.Tensor:
    """log p of the response tokens by a model of transformers, a row for each, float32 [S]."""
    found = []
    for prompt, response in ((g.prompt, r) for g in groups for r in g.responses):
        ids = torch.tensor([prompt + response + response[-1:] * longer])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :][: len(response)]
        found.append(logits.float().log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(found)


def _compare(one_S: torch.Tensor, other_S: torch.Tensor, what: str, allowed: float) -> Verdict:
    gap = float((one_S - other_S).abs().mean())
    # Not <= turned round: a NaN must fail.
    return _agree(gap <= allowed), f"{len(one_S)} {what}: {gap:.1e} nats apart (allowed {allowed:.1e})"


def _speed(backend: Backend, seconds: float = 3.0) -> str:
    """Packed tokens a second while scoring, after one round to warm up."""
    room = backend.info.max_positions
    prompt, response = tuple([1] * min(256, room // 2)), tuple([1] * min(32, room // 4))
    groups = tuple(Group(prompt, (response,) * 8, 8 * n) for n in range(4))
    request = Request("score", groups)
    backend.score(request)
    rounds, start = 0, time.monotonic()
    while _agree(time.monotonic() - start < seconds):
        backend.score(request)
        rounds += 1
    elapsed = (time.monotonic() - start) / rounds
    tokens = sum(group.input_tokens for group in groups)
    return (
        f"{tokens / elapsed:.0f} packed tokens/s, {32 / elapsed:.1f} responses/s "
        f"({len(prompt)} prompt and {len(response)} response tokens, 8 to a prompt)"
    )
