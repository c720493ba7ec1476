"""The wire: fixed-layout tensors. Nothing that arrives is unpickled or evaluated, and every field has bounds.

A message is a header, int64 [16], and then the payloads whose sizes follow from the header. A request's payload is
one int64 tensor; a reply's payloads are raw bytes (little-endian, as the header's fields say). The handshake and info
are JSON. docs/teacher.md has the layout in tables.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from inference.packing import Group

MAGIC = 0x46414F4B44  # "FAOKD"
VERSION = 1
HEADER_WORDS = 16
MAX_JSON_BYTES = 65536
MAX_TOP_K = 4096

_NAMES = ("ping", "info", "score", "topk", "gather", "hidden", "generate", "open", "next", "release")
KINDS = {name: number for number, name in enumerate(_NAMES, start=1)}
KIND_NAMES = {number: name for name, number in KINDS.items()}
GROUP_KINDS = ("score", "topk", "gather", "hidden", "generate", "open")
OK, REFUSED, STATE_LOST = 0, 1, 2
"""Status of a reply. Refused ends the session."""

DTYPE_CODES: dict[int, torch.dtype] = {1: torch.float32, 2: torch.bfloat16, 3: torch.int64, 4: torch.uint8}
CODE_OF = {dtype: code for code, dtype in DTYPE_CODES.items()}
MAX_REPLY_TENSORS = 4


class WireError(ValueError):
    """The peer sent something that this protocol does not allow. Its session ends."""


class StateLost(RuntimeError):
    """The server does not hold the decoding that a `next` goes on with: the client opens it again."""


@dataclass(frozen=True)
class Limits:
    """What a request may carry."""

    tokens: int
    rows: int
    vocab_size: int
    max_positions: int
    """Longest prompt plus response, in tokens."""
    temperature: float | None = None
    """The temperature agreed on in the handshake. None: any."""
    cache_tokens: int = 1 << 60
    """Tokens that one decoding may hold."""


@dataclass(frozen=True)
class Request:
    """One request for work, as validated."""

    kind: str
    groups: tuple[Group, ...] = ()
    """In batch order; first_response counts from 0."""
    temperature: float = 1.0
    """Softmax temperature. generate: 0 is greedy."""
    k: int = 0
    """topk, open, next: entries kept (open, next: 0 asks for hidden states). gather: ids for each response token."""
    samples: int = 0
    """generate, open: responses to each prompt."""
    max_new_tokens: int = 0
    """generate, open: longest response."""
    seed: int = 0
    """generate: seed of the request; each response has a stream of its own."""
    extras: tuple[int, ...] = field(default=(), repr=False)
    """gather: the named ids, [S, K] flattened. generate: the ids that end a response. open: the A responses that grow,
    ascending. next: those, then the A tokens that were chosen for them."""
    handle: int = 0
    """open, next, release: the client's name for its decoding."""
    owner: int = 0
    """open, next, release: the session's number, filled in by the server."""
    step: int = 0
    """open: tokens that the growing responses have. next: those that they had before this one."""

    @property
    def response_tokens(self) -> int:
        """S: response tokens in the request."""
        return sum(len(response) for group in self.groups for response in group.responses)

    @property
    def rows(self) -> int:
        """B: responses in the request."""
        return sum(len(group.responses) for group in self.groups)


def _bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]


def _float(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]


def encode_request(request: Request) -> tuple[torch.Tensor, torch.Tensor]:
    """Header [16] and payload [n], both int64."""
    prompts = [group.prompt for group in request.groups]
    responses = [response for group in request.groups for response in group.responses]
    payload: list[int] = [len(prompt) for prompt in prompts]
    payload += [len(group.responses) for group in request.groups]
    payload += [len(response) for response in responses]
    for sequence in (*prompts, *responses):
        payload.extend(sequence)
    payload.extend(request.extras)
    tokens = sum(map(len, prompts)) + sum(map(len, responses))
    header = [MAGIC, VERSION, KINDS[request.kind], len(prompts), len(responses), tokens, len(request.extras)]
    header += [_bits(request.temperature), request.k, request.samples, request.max_new_tokens, request.seed]
    header += [request.handle, request.owner, request.step]
    header += [0] * (HEADER_WORDS - len(header))
    return torch.tensor(header, dtype=torch.int64), torch.tensor(payload, dtype=torch.int64)


def check_header(header: torch.Tensor) -> list[int]:
    """The header's words, if it is one of this protocol's."""
    words = header.tolist()
    if words[0] != MAGIC:
        raise WireError("not a GRPO-KD message (wrong magic number)")
    if words[1] != VERSION:
        raise WireError(f"protocol version {words[1]}, this side speaks {VERSION}")
    return words


def request_payload_size(words: Sequence[int], limits: Limits) -> int:
    """int64 words of a request's payload, checked before anything of that size is allocated."""
    kind = KIND_NAMES.get(words[2])
    if kind is None:
        raise WireError(f"unknown request kind {words[2]}")
    groups, rows, tokens, extras = words[3:7]
    if kind not in GROUP_KINDS:
        for name, count in (("groups", groups), ("responses", rows), ("tokens", tokens)):
            _bounds(f"{name} of a {kind} request", count, 0, 0)
        _bounds("extra values", extras, 0, 2 * limits.rows if kind == "next" else 0)
        return extras
    _bounds("groups", groups, 1, limits.rows)
    _bounds("responses (teacher.max_request_rows)", rows, 0, limits.rows)
    _bounds("tokens (teacher.max_request_tokens)", tokens, 1, limits.tokens)
    _bounds("extra values", extras, 0, limits.tokens * 64)
    return 2 * groups + rows + tokens + extras


def decode_request(words: Sequence[int], payload: torch.Tensor, limits: Limits) -> Request:
    """The request in a header and its payload; WireError if any field is out of bounds."""
    kind = KIND_NAMES[words[2]]
    temperature, (k, samples, max_new, seed) = _float(words[7]), words[8:12]
    handle, owner, step = words[12:15]
    if kind not in GROUP_KINDS:
        request = Request(kind, (), temperature, k, 0, 0, 0, tuple(payload.tolist()), handle, owner, step)
        if kind == "next":
            _check_next(request, limits)
        return request
    group_count, rows, tokens, extra_count = words[3:7]
    parts = torch.split(payload, [group_count, group_count, rows, tokens, extra_count])
    prompt_lengths, per_group, response_lengths = (part.tolist() for part in parts[:3])
    ids = parts[3]
    _bounds("prompt length", min(prompt_lengths), 1, limits.max_positions)
    _bounds("prompt length", max(prompt_lengths), 1, limits.max_positions)
    _bounds("responses of a group", min(per_group), 0, rows)
    _bounds("sum of responses", sum(per_group), rows, rows)
    if response_lengths:
        _bounds("response length", min(response_lengths), 0, limits.max_positions)
        _bounds("response length", max(response_lengths), 0, limits.max_positions)
    _bounds("sum of lengths", sum(prompt_lengths) + sum(response_lengths), tokens, tokens)
    _bounds("token id", int(ids.min()), 0, limits.vocab_size - 1)
    _bounds("token id", int(ids.max()), 0, limits.vocab_size - 1)
    groups = _groups(ids.tolist(), prompt_lengths, per_group, response_lengths)
    longest = max(len(g.prompt) + max(map(len, g.responses if kind != "open" else ()), default=0) for g in groups)
    _bounds(
        "prompt and response together",
        longest + (max_new if kind in ("generate", "open") else 0),
        1,
        limits.max_positions,
    )
    extras = parts[4].tolist()
    if extras and kind != "open":
        _bounds("id among the extra values", min(extras), 0, limits.vocab_size - 1)
        _bounds("id among the extra values", max(extras), 0, limits.vocab_size - 1)
    request = Request(kind, groups, temperature, k, samples, max_new, seed, tuple(extras), handle, owner, step)
    _check_settings(request, limits)
    return request


def _check_temperature(request: Request, limits: Limits) -> None:
    low = 0.0 if request.kind == "generate" else 1e-3
    if not (math.isfinite(request.temperature) and low <= request.temperature <= 1e3):
        raise WireError(f"temperature = {request.temperature}: must be within [{low}, 1000]")
    agreed = limits.temperature
    if agreed is not None and request.kind not in ("generate", "hidden") and request.temperature != agreed:
        raise WireError(f"temperature = {request.temperature}, but the handshake agreed on {agreed}")


def _check_next(request: Request, limits: Limits) -> None:
    """Bounds of a decode step; whether the rows fit the decoding is for the ranks to say."""
    _check_temperature(request, limits)
    _bounds("k", request.k, 0, min(MAX_TOP_K, limits.vocab_size))
    rows, tokens = rows_and_tokens(request)
    _bounds("rows and tokens", len(tokens), max(1, len(rows)), len(rows))
    _check_rows(rows, limits.rows)
    _bounds("token id", min(tokens), 0, limits.vocab_size - 1)
    _bounds("token id", max(tokens), 0, limits.vocab_size - 1)


def _check_open(request: Request, limits: Limits) -> None:
    """The growing responses have `step` tokens, the others none (they have ended); every prompt has `samples`."""
    _bounds("k", request.k, 0, min(MAX_TOP_K, limits.vocab_size))
    _bounds("samples", request.samples, 1, limits.rows)
    _bounds("max_new_tokens", request.max_new_tokens, 1, limits.max_positions)
    _bounds("step", request.step, 0, request.max_new_tokens)
    _bounds("growing responses", len(request.extras), 1, request.rows)
    _check_rows(request.extras, request.rows)
    growing = set(request.extras)
    for group in request.groups:
        _bounds("responses of a group", len(group.responses), request.samples, request.samples)
        for b, response in enumerate(group.responses, start=group.first_response):
            length = request.step if b in growing else 0
            _bounds(f"tokens of response {b}", len(response), length, length)
    _bounds("tokens to hold (teacher.max_cache_tokens)", cache_tokens(request), 1, limits.cache_tokens)


def _check_rows(rows: Sequence[int], count: int) -> None:
    _bounds("response number", rows[0], 0, count - 1)
    _bounds("response number", rows[-1], 0, count - 1)
    if any(b <= a for a, b in pairwise(rows)):
        raise WireError("response numbers must ascend")


def rows_and_tokens(request: Request) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The two halves of a `next`."""
    count = len(request.extras) // 2
    return request.extras[:count], request.extras[count:]


def cache_tokens(request: Request) -> int:
    """Tokens whose keys and values an `open` asks the server to hold."""
    return sum(len(group.prompt) for group in request.groups) + request.rows * request.max_new_tokens


def _check_settings(request: Request, limits: Limits) -> None:
    """Bounds of the settings, which depend on the kind."""
    _check_temperature(request, limits)
    if request.kind == "open":
        _check_open(request, limits)
        return
    if request.kind == "topk":
        _bounds("k", request.k, 1, min(MAX_TOP_K, limits.vocab_size))
    if request.kind == "gather":
        _bounds("k", request.k, 1, MAX_TOP_K)
        size = request.response_tokens * request.k
        _bounds("named ids", len(request.extras), size, size)
    elif request.kind == "generate":
        _bounds("responses in a generate request", request.rows, 0, 0)
        _bounds("samples", request.samples, 1, max(1, limits.rows // len(request.groups)))
        _bounds("max_new_tokens", request.max_new_tokens, 1, limits.max_positions)
        _bounds("ids that end a response", len(request.extras), 0, 64)
        tokens = request.samples * sum(len(g.prompt) + request.max_new_tokens for g in request.groups)
        _bounds("tokens to generate (teacher.max_request_tokens)", tokens, 1, limits.tokens)
    else:
        _bounds("extra values", len(request.extras), 0, 0)


def _bounds(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise WireError(f"{name}: {value} is not within [{low}, {high}]")


def _groups(
    ids: list[int], prompt_lengths: list[int], per_group: list[int], response_lengths: list[int]
) -> tuple[Group, ...]:
    """Cut the ids: all prompts come first, then all responses."""
    at = 0
    sequences = []
    for length in (*prompt_lengths, *response_lengths):
        sequences.append(tuple(ids[at : at + length]))
        at += length
    prompts, responses = sequences[: len(prompt_lengths)], sequences[len(prompt_lengths) :]
    groups, first = [], 0
    for prompt, count in zip(prompts, per_group, strict=True):
        groups.append(Group(prompt, tuple(responses[first : first + count]), first))
        first += count
    return tuple(groups)


def encode_reply(
    tensors: Sequence[torch.Tensor], error: str | None = None, status: int = REFUSED
) -> list[torch.Tensor]:
    """Header and payloads (uint8) of a reply. Header: magic, version, status, count, then (dtype, rows, columns) each.

    With an `error` the one payload is a message in JSON bytes.
    """
    if error is not None:
        body = encode_json({"error": error[:4000]})
        header = [MAGIC, VERSION, status, 0, body.numel()]
        return [_header(header), body]
    header = [MAGIC, VERSION, OK, len(tensors)]
    payloads = []
    for tensor in tensors:
        matrix = tensor if tensor.dim() == 2 else tensor[:, None]
        header += [CODE_OF[tensor.dtype], matrix.shape[0], matrix.shape[1]]
        payloads.append(as_bytes(matrix))
    return [_header(header), *payloads]


def _header(words: list[int]) -> torch.Tensor:
    return torch.tensor(words + [0] * (HEADER_WORDS - len(words)), dtype=torch.int64)


def reply_layout(words: Sequence[int], max_bytes: int) -> list[tuple[torch.dtype, int, int]]:
    """(dtype, rows, columns) of each payload of a good reply, checked before anything is allocated."""
    _bounds("reply tensors", words[3], 0, MAX_REPLY_TENSORS)
    layout = []
    total = 0
    for i in range(words[3]):
        code, rows, columns = words[4 + 3 * i : 7 + 3 * i]
        if code not in DTYPE_CODES:
            raise WireError(f"unknown type code {code}")
        _bounds("rows", rows, 0, 1 << 40)
        _bounds("columns", columns, 0, 1 << 24)
        dtype = DTYPE_CODES[code]
        total += rows * columns * dtype.itemsize
        _bounds("reply bytes", total, 0, max_bytes)
        layout.append((dtype, rows, columns))
    return layout


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes, uint8 [n]."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def encode_json(value: dict[str, Any]) -> torch.Tensor:
    """uint8 [n] of UTF-8 JSON."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def decode_json(data: torch.Tensor | bytes) -> dict[str, Any]:
    """The JSON object in bytes or in uint8 [n]."""
    raw = bytes(data.tolist()) if isinstance(data, torch.Tensor) else data
    _bounds("bytes of JSON", len(raw), 2, MAX_JSON_BYTES)
    try:
        value = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise WireError(f"malformed JSON: {error}") from error
    if not isinstance(value, dict):
        raise WireError("malformed JSON: expected an object")
    return value
