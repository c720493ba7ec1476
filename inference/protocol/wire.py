"""The wire: fixed-layout tensors. Nothing that arrives is unpickled or evaluated, and every field has bounds.

A message is a header, int64 [16], and then the payloads whose sizes follow from the header. A request's payload is
one int64 tensor; a reply's payloads are raw bytes (little-endian, as the header's fields say). The handshake is JSON.
docs/teacher.md has the layout in tables.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from inference.attention.packing import Group, within

MAGIC = 0x46414F4B44  # "FAOKD"
VERSION = 4
HEADER_WORDS = 16
MAX_JSON_BYTES = 65536
MAX_REQUEST_TOKENS = 1 << 22
"""Tokens of all prompts and responses of a request: 32 MiB, several steps of the largest runs."""
PART_TOKENS = 1 << 18
"""Tokens of the parts that a client cuts a longer request into, and of requests that are answered together: many of the
teacher's rows, a few GB of hidden states, and nobody else who asks has to wait long."""
MAX_REQUEST_RESPONSES = 1 << 16
MAX_TOP_K = 4096
MAX_ENDS = 64
MAX_REPLY_TENSORS = 4
MAX_REPLY_BYTES = 1 << 36

_NAMES = ("ping", "score", "topk", "hidden", "answer", "open", "next", "release")
KINDS = {name: number for number, name in enumerate(_NAMES, start=1)}
KIND_NAMES = {number: name for name, number in KINDS.items()}
TOKEN_KINDS = ("score", "topk", "hidden")
"""About response tokens: long ones are asked in parts, and those that wait are answered together."""
GROUP_KINDS = (*TOKEN_KINDS, "answer", "open")
OK, REFUSED, STATE_LOST = 0, 1, 2
"""Status of a reply. Refused ends the session."""

DTYPE_CODES: dict[int, torch.dtype] = {1: torch.float32, 2: torch.bfloat16, 3: torch.int64, 4: torch.uint8}
CODE_OF = {dtype: code for code, dtype in DTYPE_CODES.items()}


class WireError(ValueError):
    """The peer sent something that this protocol does not allow. Its session ends."""


class Unavailable(RuntimeError):
    """The model cannot answer now. The session ends, and the client asks again until teacher.timeout_s is over."""


class StateLost(RuntimeError):
    """The server does not hold the decoding that a `next` goes on with: the client opens it again."""


@dataclass(frozen=True)
class Request:
    """One request for work, as validated."""

    kind: str
    groups: tuple[Group, ...] = ()
    """In batch order; first_response counts from 0."""
    temperature: float = 1.0
    """Softmax temperature of score, topk and answer. answer: 0 is greedy."""
    k: int = 0
    """topk: entries kept."""
    samples: int = 0
    """open: responses to each prompt."""
    max_new_tokens: int = 0
    """answer, open: longest response."""
    seed: int = 0
    """answer: seed of the request; each answer has a stream of its own (`streams`)."""
    handle: int = 0
    """open, next, release: the client's name for its decoding."""
    owner: int = 0
    """open, next, release: the session's number, filled in by the server."""
    step: int = 0
    """open: tokens that the growing responses have. next: those that they had before this one."""
    rows_A: tuple[int, ...] = field(default=(), repr=False)
    """open, next: the responses that grow, ascending. answer: the number of each answer; none: its place."""
    ids: tuple[int, ...] = field(default=(), repr=False)
    """answer: the tokens that end a response. next: the token that was chosen for each of rows_A."""

    @property
    def response_tokens(self) -> int:
        """S: response tokens in the request."""
        return sum(len(response) for group in self.groups for response in group.responses)

    @property
    def streams(self) -> list[int]:
        """The seed of each answer: what is drawn does not depend on which answers are asked for together."""
        numbers = self.rows_A or range(len(self.groups))
        return [self.seed * 1_000_003 + number & (1 << 63) - 1 for number in numbers]

    @property
    def cache_tokens(self) -> int:
        """Tokens whose keys and values an `open` asks the server to hold."""
        return sum(len(g.prompt) + len(g.responses) * self.max_new_tokens for g in self.groups)


INTEGERS = ("k", "samples", "max_new_tokens", "seed", "handle", "owner", "step")
"""Fields of a request that are header words 9 to 15."""


def in_parts(request: Request) -> list[Request]:
    """A question about response tokens in parts whose answers, end to end, are its own. A group is never cut."""
    if request.kind not in TOKEN_KINDS:
        return [request]

    def cost(group: Group) -> int:
        return max(
            len(group.prompt) + group.response_tokens, len(group.responses) * (PART_TOKENS // MAX_REQUEST_RESPONSES)
        )

    return [replace(request, groups=renumbered(part)) for part in within(request.groups, cost, PART_TOKENS)]


def renumbered(groups: Iterable[Group]) -> tuple[Group, ...]:
    """The groups with their responses counted from 0, in order."""
    out: list[Group] = []
    first = 0
    for group in groups:
        out.append(replace(group, first_response=first))
        first += len(group.responses)
    return tuple(out)


def encode_request(request: Request) -> tuple[torch.Tensor, torch.Tensor]:
    """Header [16] and payload [n], both int64."""
    prompts = [group.prompt for group in request.groups]
    responses = [response for group in request.groups for response in group.responses]
    tokens = [token for sequence in (*prompts, *responses) for token in sequence]
    payload = [len(prompt) for prompt in prompts]
    payload += [len(group.responses) for group in request.groups]
    payload += [len(response) for response in responses]
    payload += [*tokens, *request.rows_A, *request.ids]
    counts = [len(prompts), len(responses), len(tokens), len(request.rows_A), len(request.ids)]
    temperature = struct.unpack("<q", struct.pack("<d", request.temperature))[0]
    integers = [getattr(request, name) for name in INTEGERS]
    header = [MAGIC, VERSION, KINDS[request.kind], *counts, temperature, *integers]
    return torch.tensor(header, dtype=torch.int64), torch.tensor(payload, dtype=torch.int64)


def check_header(header: torch.Tensor) -> list[int]:
    """The header's words, if it is one of this protocol's."""
    words = header.tolist()
    if words[0] != MAGIC:
        raise WireError("not a GRPO-KD message (wrong magic number)")
    if words[1] != VERSION:
        raise WireError(f"protocol version {words[1]}, this side speaks {VERSION}")
    return words


def request_payload_size(words: Sequence[int]) -> int:
    """int64 words of a request's payload, checked before anything of that size is allocated."""
    kind = KIND_NAMES.get(words[2])
    if kind is None:
        raise WireError(f"unknown request kind {words[2]}")
    groups, responses, tokens, rows, ids = words[3:8]
    has_groups, grows = kind in GROUP_KINDS, kind in ("open", "next")
    bounds("groups", groups, int(has_groups), MAX_REQUEST_RESPONSES * has_groups)
    bounds("responses", responses, 0, MAX_REQUEST_RESPONSES * has_groups)
    bounds("tokens", tokens, int(has_groups), MAX_REQUEST_TOKENS * has_groups)
    bounds("growing responses", rows, int(grows), groups if kind == "answer" else MAX_REQUEST_RESPONSES * grows)
    bounds("ids", ids, *{"answer": (0, MAX_ENDS), "next": (rows, rows)}.get(kind, (0, 0)))
    return 2 * groups + responses + tokens + rows + ids


def bounds(name: str, value: int, low: int, high: int) -> None:
    """Raises WireError unless low <= value <= high."""
    if not low <= value <= high:
        raise WireError(f"{name}: {value} is not within [{low}, {high}]")


def encode_reply(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Header and payloads (uint8) of a reply. Header: magic, version, status, count, then (dtype, rows, columns) each.

    A vector is sent as one column.
    """
    header = [MAGIC, VERSION, OK, len(tensors)]
    for tensor in tensors:
        header += [CODE_OF[tensor.dtype], len(tensor), tensor.shape[1] if tensor.dim() == 2 else 1]
    return [_header(header), *(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in tensors)]


def encode_error(message: str, status: int = REFUSED) -> list[torch.Tensor]:
    """Header and payload of a reply that says in JSON what is wrong; word 4 is the payload's size."""
    body = torch.frombuffer(bytearray(json.dumps({"error": message[:4000]}).encode()), dtype=torch.uint8)
    return [_header([MAGIC, VERSION, status, 0, body.numel()]), body]


def _header(words: list[int]) -> torch.Tensor:
    return torch.tensor(words + [0] * (HEADER_WORDS - len(words)), dtype=torch.int64)


def reply_layout(words: Sequence[int], max_bytes: int = MAX_REPLY_BYTES) -> list[tuple[torch.dtype, int, int]]:
    """(dtype, rows, columns) of each payload of a good reply, checked before anything is allocated."""
    bounds("reply tensors", words[3], 0, MAX_REPLY_TENSORS)
    layout = []
    total = 0
    for i in range(words[3]):
        code, rows, columns = words[4 + 3 * i : 7 + 3 * i]
        if code not in DTYPE_CODES:
            raise WireError(f"unknown type code {code}")
        bounds("rows", rows, 0, 1 << 40)
        bounds("columns", columns, 0, 1 << 24)
        dtype = DTYPE_CODES[code]
        total += rows * columns * dtype.itemsize
        bounds("reply bytes", total, 0, max_bytes)
        layout.append((dtype, rows, columns))
    return layout


def decode_json(data: torch.Tensor | bytes) -> dict[str, Any]:
    """The JSON object in bytes or in uint8 [n]."""
    raw = bytes(data.tolist()) if isinstance(data, torch.Tensor) else data
    bounds("bytes of JSON", len(raw), 2, MAX_JSON_BYTES)
    try:
        value = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise WireError(f"malformed JSON: {error}") from error
    if not isinstance(value, dict):
        raise WireError("malformed JSON: expected an object")
    return value
