"""The wire: what goes in comes out, and nothing out of bounds gets through."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from inference.attention.packing import Group
from inference.protocol import wire
from inference.protocol.arriving import Limits, decode_request
from inference.protocol.wire import Request, WireError

LIMITS = Limits(vocab_size=100, max_positions=64)
GROUPS = (Group((1, 2, 3), ((4, 5), (), (6,)), 0), Group((7,), ((99,),), 3))
REQUESTS = {
    "score": Request("score", GROUPS, temperature=0.7),
    "hidden": Request("hidden", GROUPS),
    "topk": Request("topk", GROUPS, k=5),
    "answer": Request("answer", (Group((1, 2), ()),), 0.0, max_new_tokens=9, seed=-3, rows_A=(-7,), ids=(98, 99)),
    "open": Request(
        "open",
        (Group((1, 2), ((3, 4), (), (5, 6)), 0), Group((7,), ((8, 9), (), ()), 3)),
        samples=3,
        max_new_tokens=9,
        rows_A=(0, 2, 3),
        handle=1 << 61,
        owner=4,
        step=2,
    ),
    "next": Request("next", rows_A=(0, 3), ids=(10, 99), handle=1 << 61, owner=4, step=2),
    "release": Request("release", handle=5),
    "ping": Request("ping"),
}
# Header words: 0 magic, 1 version, 2 kind, 3 groups, 4 responses, 5 tokens, 6 rows, 7 ids, 8 temperature, 9 k,
# 10 samples, 11 max_new_tokens, 12 seed, 13 handle, 14 owner, 15 step.
# Payload of GROUPS: 2 prompt lengths, 2 counts, 4 response lengths, 8 ids.


def receive(header: torch.Tensor, payload: torch.Tensor, limits: Limits = LIMITS) -> Request:
    words = wire.check_header(header)
    assert wire.request_payload_size(words) == payload.numel()
    return decode_request(words, payload, limits)


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_survives_the_wire(name: str) -> None:
    assert receive(*wire.encode_request(REQUESTS[name])) == REQUESTS[name]


def test_the_layout_is_what_the_documentation_says() -> None:
    header, payload = wire.encode_request(REQUESTS["score"])
    assert header.tolist()[:8] == [wire.MAGIC, wire.VERSION, 2, 2, 4, 8, 0, 0]
    assert header[8:9].view(torch.float64).item() == 0.7
    assert payload.tolist() == [3, 1, 3, 1, 2, 0, 1, 1, 1, 2, 3, 7, 4, 5, 6, 99]


@pytest.mark.parametrize(
    ("word", "value", "message"),
    [
        (0, 0, "magic"),
        (1, 1, "version 1"),
        (2, 0, "kind 0"),
        (2, 1 << 62, "kind"),
        (3, 0, "groups"),
        (3, -1, "groups"),
        (3, wire.MAX_REQUEST_RESPONSES + 1, "groups"),
        (4, 1 << 62, "responses"),
        (5, wire.MAX_REQUEST_TOKENS + 1, "tokens"),
        (5, -(1 << 63), "tokens"),
        (6, -1, "growing"),
        (6, 1 << 62, "growing"),
        (7, -1, "ids"),
        (7, 1, "ids"),
    ],
)
def test_a_bad_header_is_refused_before_anything_is_allocated(word: int, value: int, message: str) -> None:
    header, _ = wire.encode_request(REQUESTS["score"])
    header[word] = value
    with pytest.raises(WireError, match=message):
        wire.request_payload_size(wire.check_header(header))


@pytest.mark.parametrize(
    ("word", "value", "message"),
    [
        (0, 0, "prompt length: 0"),
        (0, -5, "prompt length: -5"),
        (0, 65, "prompt length: 65"),
        (2, -1, "responses of a group"),
        (2, 2, "sum of responses"),
        (4, -1, "response length"),
        (4, 3, "sum of lengths"),
        (8, -1, "token id: -1"),
        (15, 100, "token id: 100"),
        (15, 1 << 62, "token id"),
    ],
)
def test_a_bad_payload_is_refused(word: int, value: int, message: str) -> None:
    header, payload = wire.encode_request(REQUESTS["score"])
    payload[word] = value
    with pytest.raises(WireError, match=message):
        receive(header, payload)


@pytest.mark.parametrize("temperature", [math.nan, math.inf, -1.0, 0.0])
def test_temperatures_that_are_no_temperatures(temperature: float) -> None:
    with pytest.raises(WireError, match="temperature"):
        receive(*wire.encode_request(Request("score", GROUPS, temperature)))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("topk", GROUPS, k=0), "k: 0"),
        (Request("topk", GROUPS, k=101), "k: 101"),
        (Request("score", GROUPS, ids=(1,)), "ids: 1"),
        (Request("answer", GROUPS, max_new_tokens=1), "tokens of an answer"),
        (Request("answer", (Group((1,), ()),), max_new_tokens=0), "max_new_tokens"),
        (Request("answer", (Group((1,), ()),), max_new_tokens=64), "together: 65"),
        (Request("answer", (Group((1,), ()),), max_new_tokens=1, ids=(100,)), "token id: 100"),
        (Request("answer", (Group((1,), ()),), max_new_tokens=1, ids=(1,) * 65), "ids: 65"),
        (Request("answer", (Group((1,), ()),) * 2, max_new_tokens=1, rows_A=(1,)), "numbered answers: 1"),
        (Request("answer", (Group((1,), ()),) * 2, max_new_tokens=1, rows_A=(1, 2, 3)), "growing responses: 3"),
        (Request("score", (Group((1,) * 40, ((2,) * 30,), 0),)), "together: 70"),
    ],
)
def test_settings_out_of_bounds(request_: Request, message: str) -> None:
    with pytest.raises(WireError, match=message):
        receive(*wire.encode_request(request_))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("next", {"rows_A": (), "ids": ()}, "growing responses: 0"),
        ("next", {"ids": (10,)}, "ids: 1"),
        ("next", {"rows_A": (3, 0)}, "ascend"),
        ("next", {"rows_A": (0, 1 << 16)}, "response number: 65536"),
        ("next", {"rows_A": (-1, 3)}, "response number: -1"),
        ("next", {"ids": (10, 100)}, "token id: 100"),
        ("next", {"temperature": math.nan}, "temperature"),
        ("open", {"rows_A": ()}, "growing responses: 0"),
        ("open", {"rows_A": (0, 2, 6)}, "response number: 6"),
        ("open", {"rows_A": (0, 2)}, "tokens of response 3: 2"),
        ("open", {"rows_A": (0, 1, 2, 3)}, "tokens of response 1: 0"),
        ("open", {"step": 1}, "tokens of response 0: 2"),
        ("open", {"step": 10}, "step: 10"),
        ("open", {"samples": 2}, "responses of a group: 3"),
        ("open", {"max_new_tokens": 63}, "together: 65"),
        ("open", {"max_new_tokens": 60}, "max_cache_tokens"),
        ("open", {"temperature": math.inf}, "temperature"),
    ],
)
def test_decode_steps_out_of_bounds(kind: str, changes: dict[str, Any], message: str) -> None:
    limits = dataclasses.replace(LIMITS, cache_tokens=200)
    with pytest.raises(WireError, match=message):
        receive(*wire.encode_request(dataclasses.replace(REQUESTS[kind], **changes)), limits)


def test_an_answer_may_not_be_longer_than_any_request() -> None:
    prompts = (Group((1,), ()),) * 5
    with pytest.raises(WireError, match="tokens to generate: 5000005"):
        receive(
            *wire.encode_request(Request("answer", prompts, max_new_tokens=1_000_000)),
            dataclasses.replace(LIMITS, max_positions=1 << 20),
        )


def test_a_reply_survives_the_wire() -> None:
    tensors = [
        torch.tensor([1.5, -2.0, math.nan]),
        torch.tensor([[1, 2], [3, -4]]),
        torch.tensor([[0.5, 1.0, -3.0]], dtype=torch.bfloat16),
        torch.zeros(0, 7),
    ]
    header, *payloads = wire.encode_reply(tensors)
    layout = wire.reply_layout(wire.check_header(header), 1000)
    assert layout == [(torch.float32, 3, 1), (torch.int64, 2, 2), (torch.bfloat16, 1, 3), (torch.float32, 0, 7)]
    for tensor, payload, (dtype, rows, columns) in zip(tensors, payloads, layout, strict=True):
        back = payload.view(dtype).view(rows, columns)
        assert torch.equal(back.nan_to_num(9.0), tensor.view(rows, columns).nan_to_num(9.0))


@pytest.mark.parametrize(("word", "value"), [(3, 5), (3, -1), (4, 9), (5, -1), (5, 1 << 50), (6, 1 << 40), (5, 1000)])
def test_a_bad_reply_is_refused(word: int, value: int) -> None:
    header, _ = wire.encode_reply([torch.zeros(3)])
    header[word] = value
    with pytest.raises(WireError):
        wire.reply_layout(wire.check_header(header), 1000)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xff", b'{"a":' + b"[" * 60000, b"1" * 70000])
def test_malformed_json(data: bytes) -> None:
    with pytest.raises(WireError):
        wire.decode_json(data)


def test_no_header_of_random_words_gets_through() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        header = torch.randint(-(2**62), 2**62, (wire.HEADER_WORDS,), generator=generator)
        header[0], header[1] = wire.MAGIC, wire.VERSION
        with pytest.raises(WireError):
            wire.request_payload_size(wire.check_header(header))
