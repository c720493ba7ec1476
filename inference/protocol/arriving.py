"""A request that arrives: read from its header and payload, every field held to its bounds. The server's side alone."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from inference.attention.packing import Group
from inference.protocol.wire import (
    INTEGERS,
    KIND_NAMES,
    MAX_REQUEST_RESPONSES,
    MAX_REQUEST_TOKENS,
    MAX_TOP_K,
    Request,
    WireError,
    bounds,
)


@dataclass(frozen=True)
class Limits:
    """What the teacher makes of a request's bounds."""

    vocab_size: int
    max_positions: int
    """Longest prompt plus response, in tokens."""
    cache_tokens: int = 1 << 60
    """Tokens that one decoding may hold."""


def decode_request(words: Sequence[int], payload: torch.Tensor, limits: Limits) -> Request:
    """The request in a header and its payload; WireError if any field is out of bounds."""
    groups, responses, tokens, rows, ids = words[3:8]
    parts = torch.split(payload, [groups, groups, responses, tokens, rows, ids])
    for part in (parts[3], parts[5]):
        if len(part):
            bounds("token id", int(part.min()), 0, limits.vocab_size - 1)
            bounds("token id", int(part.max()), 0, limits.vocab_size - 1)
    prompt_lengths, per_group, response_lengths, flat, rows_A, chosen = (part.tolist() for part in parts)
    for name, values, low, high in (
        ("prompt length", prompt_lengths, 1, limits.max_positions),
        ("responses of a group", per_group, 0, responses),
        ("response length", response_lengths, 0, limits.max_positions),
    ):
        for value in (min(values, default=low), max(values, default=low)):
            bounds(name, value, low, high)
    bounds("sum of responses", sum(per_group), responses, responses)
    bounds("sum of lengths", sum(prompt_lengths) + sum(response_lengths), tokens, tokens)
    request = Request(
        kind=KIND_NAMES[words[2]],
        groups=_groups(flat, prompt_lengths, per_group, response_lengths),
        temperature=struct.unpack("<d", struct.pack("<q", words[8]))[0],
        rows_A=tuple(rows_A),
        ids=tuple(chosen),
        **dict(zip(INTEGERS, words[9:], strict=True)),
    )
    _check(request, limits)
    return request


def _groups(flat: list[int], prompts: list[int], per_group: list[int], responses: list[int]) -> tuple[Group, ...]:
    """Cut the tokens by these lengths: all prompts come first, then all responses."""
    at = 0
    sequences = []
    for length in (*prompts, *responses):
        sequences.append(tuple(flat[at : at + length]))
        at += length
    groups, first = [], 0
    for prompt, count in zip(sequences, per_group, strict=False):
        start = len(prompts) + first
        groups.append(Group(prompt, tuple(sequences[start : start + count]), first))
        first += count
    return tuple(groups)


def _check(request: Request, limits: Limits) -> None:
    """Bounds that depend on the kind."""
    coldest = 0.0 if request.kind == "answer" else 1e-3
    if not (math.isfinite(request.temperature) and coldest <= request.temperature <= 1e3):
        raise WireError(f"temperature = {request.temperature}: must be within [{coldest}, 1000]")
    grows = request.kind in ("answer", "open")
    if grows:
        bounds("max_new_tokens", request.max_new_tokens, 1, limits.max_positions)
    for group in request.groups:
        longest = request.max_new_tokens if grows else max(map(len, group.responses), default=0)
        bounds("prompt and response together", len(group.prompt) + longest, 1, limits.max_positions)
    if request.kind == "topk":
        bounds("k", request.k, 1, min(MAX_TOP_K, limits.vocab_size))
    elif request.kind == "answer":
        bounds("response tokens of an answer request", request.response_tokens, 0, 0)
        tokens = sum(len(group.prompt) + request.max_new_tokens for group in request.groups)
        bounds("tokens to generate", tokens, 1, MAX_REQUEST_TOKENS)
        bounds(
            "numbered answers", len(request.rows_A), len(request.groups) if request.rows_A else 0, len(request.groups)
        )
    elif request.kind == "open":
        _check_open(request, limits)
    elif request.kind == "next":  # whether the rows fit the decoding is for the ranks to say
        _check_rows(request.rows_A, MAX_REQUEST_RESPONSES)


def _check_open(request: Request, limits: Limits) -> None:
    """The growing responses have `step` tokens, the others none (they have ended); every prompt has `samples`."""
    bounds("step", request.step, 0, request.max_new_tokens)
    _check_rows(request.rows_A, sum(len(group.responses) for group in request.groups))
    growing = set(request.rows_A)
    for group in request.groups:
        bounds("responses of a group", len(group.responses), max(request.samples, 1), request.samples)
        for b, response in enumerate(group.responses, start=group.first_response):
            length = request.step if b in growing else 0
            bounds(f"tokens of response {b}", len(response), length, length)
    bounds("tokens to hold (teacher.max_cache_tokens)", request.cache_tokens, 1, limits.cache_tokens)


def _check_rows(rows: Sequence[int], count: int) -> None:
    bounds("response number", rows[0], 0, count - 1)
    bounds("response number", rows[-1], 0, count - 1)
    if any(b <= a for a, b in pairwise(rows)):
        raise WireError("response numbers must ascend")
