"""The parts of grouped attention and of the log-probabilities, against plain formulas."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from inference.attention import packed
from inference.attention import prompt_cache as shared_prompt
from inference.attention.blocks import alike, parts_of
from inference.attention.decode import DecodePlan
from inference.attention.grouped import ScoreRule
from inference.attention.packed import PackedPlan, PrefillPlan
from inference.attention.packing import Group, PackedRow, pack_row
from inference.attention.varlen import VarlenLayout, torch_kernel
from training.student.token_logprobs import TokenLogprobs


def a_row() -> PackedRow:
    return pack_row(
        [
            Group(prompt=(1, 2, 3, 4, 5), responses=((6, 7, 8), (), (9,), (6, 5, 4, 3))),
            Group(prompt=(1,), responses=((2, 3),)),
            Group(prompt=(7, 7, 7), responses=((4, 4, 4), (5, 6, 7, 8))),
        ]
    )


def heads(row: PackedRow) -> tuple[torch.Tensor, ...]:
    stream = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(len(row.tokens_T), n, 8, dtype=torch.float64, generator=stream, requires_grad=True)
        for n in (4, 2, 2)
    )


def dense(row: PackedRow, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
    """Each query over all keys of the row, one at a time, with what it may see written out."""
    group_of = [g for g, n in enumerate(row.group_lengths) for _ in range(n)]
    segments, positions = row.segments_T.tolist(), row.positions_T.tolist()
    out = []
    for i in range(len(q)):
        seen = [
            j for j in range(len(q))
            if group_of[i] == group_of[j] and segments[j] in (0, segments[i]) and positions[j] <= positions[i]
            and (window is None or positions[i] - positions[j] < window)
        ]  # fmt: skip
        for h in range(q.shape[1]):
            weights = ((k[seen, h // 2] @ q[i, h]) * 0.3).softmax(0)
            out.append(weights @ v[seen, h // 2])
    return torch.stack(out).view(q.shape)


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize(("weights_at_a_time", "apart"), [(1, False), (1 << 24, False), (1 << 24, True)])
def test_attention_and_its_gradients_equal_the_dense_formula(
    window: int | None, weights_at_a_time: int, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_prompt, "MAX_WEIGHTS", weights_at_a_time)
    if apart:
        monkeypatch.setattr(packed, "alike", lambda parts, _: [[part] for part in reversed(parts)])
    row = a_row()
    inputs = heads(row)
    want = dense(row, *inputs, window)
    got = PackedPlan(row).attend(0, *inputs, ScoreRule(0.3, window))
    assert torch.allclose(got, want, atol=1e-12)
    weights = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for mine, theirs in zip(
        torch.autograd.grad((got * weights).sum(), inputs),
        torch.autograd.grad((want * weights).sum(), inputs),
        strict=True,
    ):
        assert torch.allclose(mine, theirs, atol=1e-12)


def test_short_groups_are_not_padded_to_long_ones() -> None:
    short = [Group(prompt=(1,) * 12, responses=((2,) * 4,) * 8)] * 20
    texts = [Group(prompt=(1,) * 200, responses=((2,) * 3,) * 8)] * 2
    tales = [Group(prompt=(1,) * 11, responses=((2,) * 40, *[(2,) * 30] * 7))] * 4
    tale = Group(prompt=(1,) * 11, responses=((2,) * 20,) * 8)

    def blocks(*groups: Group) -> list[int]:
        return [len(block) for block in alike(parts_of(pack_row(groups)), torch.device("cpu"))]

    assert blocks(*short, *texts, *tales) == [20, 2, 4]
    assert blocks(*short) == [20]
    assert blocks(short[0], tale) == [2]  # too little to win


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float, causal: bool, window_size: tuple[int, int],
) -> torch.Tensor:  # fmt: skip
    """flash_attn_varlen_func as its documentation says it: causal from the bottom right, window of keys to the left."""
    assert causal
    assert max_seqlen_q == int(cu_seqlens_q.diff().max())
    assert max_seqlen_k == int(cu_seqlens_k.diff().max())
    out = torch.empty_like(q)
    for s in range(len(cu_seqlens_q) - 1):
        queries = range(int(cu_seqlens_q[s]), int(cu_seqlens_q[s + 1]))
        start, end = int(cu_seqlens_k[s]), int(cu_seqlens_k[s + 1])
        for n, i in enumerate(queries):
            last = end - start - len(queries) + n  # the key that this query is aligned with
            first = 0 if window_size[0] < 0 else max(0, last - window_size[0])
            span = slice(start + first, start + last + 1)
            for h in range(q.shape[1]):
                weights = ((k[span, h // 2] @ q[i, h]) * softmax_scale).softmax(0)
                out[i, h] = weights @ v[span, h // 2]
    return out


@pytest.mark.parametrize("window", [None, 3])
def test_the_layout_for_flash_attention(window: int | None) -> None:
    row = a_row()
    inputs = tuple(t.detach() for t in heads(row))
    layout = VarlenLayout(parts_of(row), torch.device("cpu"))
    # Prompts of 5, 1 and 3; responses give one input less than they have tokens, and those with none are left out.
    assert layout.settings["cu_seqlens_q"].tolist() == [0, 5, 6, 9, 11, 14, 15, 17, 20]
    assert layout.settings["cu_seqlens_k"].tolist() == [0, 5, 6, 9, 16, 24, 26, 31, 37]
    got = layout.attend(varlen_attention, *inputs, scale=0.3, window=window)
    assert torch.allclose(got, dense(row, *inputs, window), atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_token_logprobs_and_their_gradient(temperature: float) -> None:
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([0, 10, 3, 3, 7])
    weights = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0])
    logprobs = (logits / temperature).log_softmax(-1)
    want = logprobs.gather(-1, labels[:, None])[:, 0]
    (want_grad,) = torch.autograd.grad((want * weights).sum(), logits, retain_graph=True)
    chosen, entropy = TokenLogprobs.apply(logits * 1.0, labels, temperature)
    (grad,) = torch.autograd.grad((chosen * weights).sum(), logits)
    assert torch.allclose(chosen, want, atol=1e-6)
    assert torch.allclose(entropy, -(logprobs.exp() * logprobs).sum(-1), atol=1e-5)
    assert torch.allclose(grad, want_grad, atol=1e-6)


def test_entropy_of_equals_and_unread_logits() -> None:
    logits = torch.zeros(1, 4)
    chosen, entropy = TokenLogprobs.apply(logits, torch.tensor([2]), 1.0)
    assert float(chosen) == pytest.approx(-math.log(4))
    assert float(entropy) == pytest.approx(math.log(4))
    huge = torch.tensor([[1000.0, 0.0]])
    chosen, _ = TokenLogprobs.apply(huge, torch.tensor([1]), 1.0)
    assert float(chosen) == -1000.0
    assert huge.tolist() == [[1000.0, 0.0]]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("size", [8, 6])
@pytest.mark.parametrize("asks_for_groups", [False, True])
def test_torchs_own_kernel_is_called_with_what_flash_attention_takes(
    window: int | None, size: int, asks_for_groups: bool
) -> None:
    """torch's `varlen_attn` says causal by a window without anything after the query, and pads no heads itself."""
    seen: list[dict[str, Any]] = []

    def plain(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor,
        max_q: int, max_k: int, *, scale: float, window_size: tuple[int, int], **more: Any,
    ) -> torch.Tensor:  # fmt: skip
        assert query.shape[-1] % 8 == key.shape[-1] % 8 == 0
        assert window_size[1] == 0
        seen.append(more)
        return varlen_attention(
            query, key, value, cu_seqlens_q=cu_seq_q, cu_seqlens_k=cu_seq_k, max_seqlen_q=max_q, max_seqlen_k=max_k,
            softmax_scale=scale, causal=True, window_size=window_size,
        )  # fmt: skip

    def with_groups(*a: Any, window_size: tuple[int, int], enable_gqa: bool = False, **k: Any) -> torch.Tensor:
        return plain(*a, window_size=window_size, enable_gqa=enable_gqa, **k)

    kernel = torch_kernel(with_groups if asks_for_groups else plain)
    assert kernel is not None
    row = a_row()
    inputs = tuple(x[..., :size] for x in heads(row))
    got = VarlenLayout(parts_of(row), torch.device("cpu")).attend(kernel, *inputs, scale=0.3, window=window)
    assert got.shape[-1] == size
    torch.testing.assert_close(got, dense(row, *inputs, window=window), atol=1e-12, rtol=0)
    assert seen == [{"enable_gqa": True} if asks_for_groups else {}]


def test_a_row_is_laid_out_for_the_way_that_it_goes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA half precision goes through the kernel; the padded blocks of each row would be made for nobody."""
    monkeypatch.setattr(packed, "flash_attention", lambda device: lambda query, key, value, **_: query)
    row, rule = a_row(), ScoreRule(0.3, None)
    half, single = (tuple(x.to(dtype) for x in heads(row)) for dtype in (torch.bfloat16, torch.float32))
    made = [{"_varlen"}, {"_blocks", "_place_T"}]
    for inputs, want in zip((half, single), made, strict=True):
        plan = PackedPlan(row)
        plan.attend(0, *inputs, rule)
        assert vars(plan).keys() & {"_varlen", "_blocks", "_place_T"} == want


def test_torchs_installed_kernel_takes_these_arguments() -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    signature = inspect.signature(varlen.varlen_attn)
    assert (torch_kernel(varlen.varlen_attn) is not None) == ("window_size" in signature.parameters)
    signature.bind("q", "k", "v", "cu_q", "cu_k", "max_q", "max_k", scale=1.0, window_size=(-1, 0))


def test_a_kernel_without_a_window_is_left_out() -> None:
    assert torch_kernel(lambda query, key, value, *, scale: query) is None


class Waits(TorchDispatchMode):
    """Operations for which a host would wait for a CUDA device: they read a number, find a size, or copy host data."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "lift_fresh")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        masks = [t for t in args[1] if t is not None and t.dtype == torch.bool] if name.startswith("index") and (
            isinstance(args[1], list | tuple)
        ) else []  # fmt: skip
        if name in self.NAMES or masks:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_what_would_wait_is_seen() -> None:
    numbers = torch.arange(4.0)
    for wait in (lambda: numbers.sum().item(), lambda: numbers[numbers > 1], lambda: bool((numbers > 9).any()),
                 lambda: torch.tensor([1, 2])):  # fmt: skip
        with Waits() as waits:
            wait()
        assert waits.seen
    with Waits() as waits:
        numbers[torch.arange(2)] + numbers.index_select(0, torch.arange(2))
    assert waits.seen == []


@pytest.mark.parametrize("window", [None, 2, 3, 9])
def test_no_layer_waits_for_the_device(window: int | None) -> None:
    """Forward and backward of a packed row, prefill and decoding: nothing in `attend` reads a number on the host."""
    row = a_row()
    inputs = heads(row)
    varlen = VarlenLayout(parts_of(row), torch.device("cpu"))
    kernel = torch_kernel(lambda query, key, value, *_, scale, window_size: query * scale + key.sum() + value.sum())
    assert kernel is not None
    plan = PackedPlan(row)
    assert plan._blocks
    assert plan._place_T is None or len(plan._place_T)  # laid out once a row, from lists of the host
    with Waits() as waits:
        for layer in range(2):
            plan.attend(layer, *inputs, ScoreRule(0.3, window)).sum().backward()
            varlen.attend(kernel, *inputs, scale=0.3, window=window).sum().backward()
    assert waits.seen == []
    prompts = pack_row([Group((1, 2, 3, 4, 5), ()), Group((1, 2), ())])
    prefill = PrefillPlan(prompts)
    assert prefill._blocks
    assert prefill._place_T is None
    query, key, value = (torch.randn(7, n, 8) for n in (4, 2, 2))
    with Waits() as waits:
        prefill.attend(0, query, key, value, ScoreRule(0.3, window))
    assert waits.seen == []
    decode = DecodePlan(prefill.cache, 2, 4)
    for rows_A in (torch.arange(4), torch.tensor([0, 1, 3]), torch.tensor([3])):
        decode.advance(rows_A)
        query, key, value = (torch.randn(len(rows_A), n, 8) for n in (4, 2, 2))
        with Waits() as waits:
            decode.attend(0, query, key, value, ScoreRule(0.3, window))
        assert waits.seen == []
