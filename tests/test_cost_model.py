"""The counts of training/cost_model.py against the real thing: packing, wire format, the products of a pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from configs.schema import SamplingConfig
from inference import wire
from inference.families import parse_architecture
from inference.packing import Group, pack
from inference.wire import Request
from tests.student_models import VOCAB, save
from training import cost_model
from training.cost_model import Card, Layout, Work
from training.policy import Policy, load_policy
from training.sampling import prompt_generator, sample

WORK = Work(prompts=3, group=2, prompt=7, response=5)


def groups() -> list[Group]:
    random = torch.Generator().manual_seed(0)

    def text(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCAB, (length,), generator=random).tolist())

    return [
        Group(text(WORK.prompt), tuple(text(WORK.response) for _ in range(WORK.group))) for _ in range(WORK.prompts)
    ]


@pytest.fixture(scope="module", params=["llama", "mistral"])
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return load_policy(save(request.param, tmp_path_factory.mktemp("student")), "float32")


def products(counter: FlopCounterMode) -> int:
    """Operations in matrix products with weights; attention goes through kernels of its own."""
    counts: dict[Any, int] = counter.get_flop_counts()["Global"]
    return sum(count for op, count in counts.items() if str(op) in ("aten.mm", "aten.addmm"))


def test_tokens_and_bytes_are_exact() -> None:
    rows = pack(groups(), 10**6)
    assert sum(len(row.tokens_T) for row in rows) == WORK.packed
    assert sum(len(row.labels_S) for row in rows) == WORK.predicted == 30
    for kind in ("score", "hidden"):
        sent = wire.encode_request(Request(kind, tuple(groups())))
        assert sum(t.numel() * t.itemsize for t in sent) == cost_model.request_bytes(WORK)
    for answer, hidden in ((torch.zeros(30, 1), 0), (torch.zeros(30, 12, dtype=torch.bfloat16), 12)):
        reply = wire.encode_reply([answer])
        assert sum(t.numel() * t.itemsize for t in reply) == cost_model.reply_bytes(WORK, hidden)


def test_the_products_of_a_pass_are_exact(policy: Policy) -> None:
    """Forward, and with the backward pass three times as much."""
    a = parse_architecture(policy.config.to_dict())
    expected = 2 * (cost_model.layer_weights(a) * WORK.packed + cost_model.output_weights(a) * WORK.predicted)
    (row,) = pack(groups(), 10**6)
    with FlopCounterMode(display=False) as forward:
        out = policy(row)
    assert products(forward) == expected
    with FlopCounterMode(display=False) as backward:
        out.logprobs_S.sum().backward()
    assert products(backward) == 2 * expected


def test_the_products_of_sampling_are_exact(policy: Policy) -> None:
    a = parse_architecture(policy.config.to_dict())
    with FlopCounterMode(display=False) as counter:
        samples = sample(
            policy, [g.prompt for g in groups()], SamplingConfig(group_size=WORK.group, max_new_tokens=WORK.response),
            end_tokens=(), generators=[prompt_generator(0, 0, n) for n in range(WORK.prompts)],
        )  # fmt: skip
    assert {len(r) for r in samples.responses} == {WORK.response}
    each = cost_model.layer_weights(a) + cost_model.output_weights(a)
    prefill = cost_model.layer_weights(a) * WORK.prompt + cost_model.output_weights(a)
    assert products(counter) == 2 * (WORK.prompts * prefill + WORK.responses * (WORK.response - 1) * each)


@pytest.mark.parametrize("window", [None, 4, 9, 100])
@pytest.mark.parametrize(("first", "last"), [(0, 7), (7, 11), (3, 3), (2, 9)])
def test_the_keys_that_are_seen(first: int, last: int, window: int | None) -> None:
    assert cost_model.seen(first, last, window) == sum(min(i + 1, window or i + 1) for i in range(first, last))


def test_attention_and_caches_by_hand() -> None:
    """One prompt of 3 tokens, 2 responses of 3: 6 pairs in the prompt, 4 + 5 in each response."""
    shape = {**cost_model.SHAPES["llama2_7b"], "num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 16,
             "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 10}  # fmt: skip
    a = parse_architecture(shape)
    assert cost_model.layer_weights(a) == 8 * 4 * (2 * 2 + 2 * 1) + 3 * 8 * 16 == 576
    work = Work(prompts=1, group=2, prompt=3, response=3)
    products = 2 * 576 * (3 + 2 * 2) + 2 * 80 * 6
    assert cost_model.forward_flops(a, work) == products + 4 * 2 * 4 * (6 + 2 * (4 + 5))
    # Two decoding steps: the weights twice; the prompt's 3 entries twice; 1 and 2 of each response's own.
    assert cost_model.decode_bytes(a, work) == 2 * (576 + 80) * 2 + (2 * 1 * 4 * 2) * (3 * 2 + 2 * (1 + 2))


def test_what_is_exchanged() -> None:
    """ZeRO 1: gradients and weights once, three quarters of them to others; ZeRO 3: in every pass."""
    assert cost_model.exchange_bytes(100, 4, 1, passes=5, forwards=7) == 2 * 200 * 3 / 4
    assert cost_model.exchange_bytes(100, 4, 3, passes=5, forwards=7) == 200 * 3 / 4 * (15 + 7)
    assert cost_model.exchange_bytes(100, 1, 3, passes=5, forwards=7) == 0


def test_more_cards_never_make_a_step_slower(capsys: pytest.CaptureFixture[str]) -> None:
    student, teacher = (parse_architecture(cost_model.SHAPES[n]) for n in ("mistral_7b", "gemma3_27b"))
    card: Card = cost_model.H100
    work = Work(prompts=64)
    best = []
    for cards in (8, 16, 64):
        found = list(cost_model.layouts(student, work, cards, 1, card))
        assert all(isinstance(layout, Layout) and layout.cards <= cards for layout in found)
        timed = [cost_model.step_seconds(student, teacher, work, layout, card, hidden=False) for layout in found]
        best.append(min(cost_model.whole_step(parts) for parts in timed))
    assert best == sorted(best, reverse=True)
    assert not list(cost_model.layouts(student, work, 1, 1, card)), "one card has no room for both"


def test_the_shapes_are_those_of_the_models() -> None:
    """Matrices of all layers and both embeddings, against the published sizes (norms left out)."""
    sizes = {"mistral_7b": 7.248e9, "llama2_7b": 6.738e9, "llama2_70b": 68.977e9, "gemma3_27b": 27.009e9}
    for name, size in sizes.items():
        assert cost_model.weights(parse_architecture(cost_model.SHAPES[name])) == pytest.approx(size, rel=2e-3), name
