"""The FLOPs that MFU is made of, against torch's own count of a model's matrix products. Needs no GPU."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from tests.gpu import bench_shapes as shapes
from tests.gpu.bench_gpu import table
from tests.gpu.bench_shapes import GROUP, TINY_MODELS, Work


@pytest.mark.parametrize("name", TINY_MODELS)
def test_flops_are_those_that_torch_counts(name: str) -> None:
    shape = TINY_MODELS[name]
    kind = {"llama": "Llama", "mistral": "Mistral"}[shape.family]
    config = getattr(transformers, f"{kind}Config")(**shape.settings())
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    norms = sum(p.numel() for n, p in model.named_parameters() if "norm" in n)
    assert sum(p.numel() for p in model.parameters()) == shape.parameters + norms
    model.set_attn_implementation("eager")
    tokens = torch.randint(3, shape.vocab, (3, 7))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    # Eager attention computes all pairs, seen or not: 7 x 7. The rotary angles' product (1 x 1 an angle) is its own.
    work = Work(tokens=21, predicted=21, pairs=3 * 7 * 7)
    angles = 2 * 7 * (shape.hidden // shape.heads // 2)
    assert counter.get_total_flops() in (work.flops(shape), work.flops(shape) + angles, work.flops(shape) + 3 * angles)


def test_a_phase_computes_what_its_parts_do() -> None:
    """Prefill and decoding together read what one packed pass reads, and predict the same tokens."""
    N, P, R = 5, 11, 6
    first, later, whole = shapes.prefill(N, P, grouped=True), shapes.decode(N, P, R), shapes.forward(
        N, P, R, grouped=True
    )  # fmt: skip
    assert first.tokens + later.tokens == whole.tokens
    assert first.pairs + later.pairs == whole.pairs
    assert first.predicted * GROUP + later.predicted == whole.predicted  # one state predicts G first tokens
    plain = shapes.forward(N, P, R, grouped=False)
    assert plain.tokens == N * GROUP * (P + R - 1)
    assert plain.pairs == GROUP * first.pairs + later.pairs
    # Decoding reads all weights for each token after the first; a prompt's cache once a token, whatever G is.
    shape, later = TINY_MODELS["tiny Llama"], shapes.decode(1, 10, 3)
    weights = shape.linear + shape.vocab * shape.hidden
    per_token = 2 * shape.layers * shape.kv_heads * (shape.hidden // shape.heads)
    assert later.bytes(shape) == 2 * (2 * weights + (2 * 10 + GROUP * (1 + 2)) * per_token)
    assert shapes.known_peak("NVIDIA H100 80GB HBM3") == (989e12, "NVIDIA H100 data sheet, SXM")
    assert shapes.known_peak("NVIDIA H100 PCIe") is None


def test_the_table() -> None:
    row = {"model": "m", "tokens": "4/8", "phase": "update", "variant": "grouped, SDPA"}
    rows = [
        {
            **row,
            "seconds": 0.5,
            "rounds": 3,
            "count": 1000,
            "flops": 1e12,
            "bytes": 4e9,
            "memory_gb": 1.25,
            "kernels": 70,
            "waits": 2,
        },
        {**row, "note": "does not fit"},
        {**row, "error": "RuntimeError: no"},
    ]
    lines = table(rows, 1e13, 5e12, 2e12)
    assert "| m | 4/8 | update | grouped, SDPA | 0.5 | 3 | 2,000 | 0.2 | 0.002 | 20.0 % | 70 | 2 | 1.2 |" in lines
    assert "- m, update 4/8 grouped, SDPA: does not fit" in lines
    assert "- m, update 4/8 grouped, SDPA: RuntimeError: no" in lines
    assert lines.index("FAILED:") > lines.index("Left out:")
