"""Where the GPU tests run: CUDA, or with GRPO_KD_GPU_DRY_RUN=1 the CPU, so that every line runs without a GPU too."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from inference.attention import packed as attention
from inference.attention.packing import PackedRow, groups_of, pack_row
from inference.attention.varlen import flash_attention
from tests.support.recorded_graph import recorded
from tests.support.student_models import build
from training.student import graph_decoder, sampling
from training.student.policy import Policy, Way

DRY_RUN = os.environ.get("GRPO_KD_GPU_DRY_RUN") == "1"
DEVICE = torch.device("cpu") if DRY_RUN or not torch.cuda.is_available() else torch.device("cuda", 0)
ON_DEVICE = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cpu" and not DRY_RUN, reason="no CUDA device (tests/gpu/run.sh)"),
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROMPTS = [(1, 2, 3, 4, 5, 6), (7, 8), (9,), tuple(range(20, 32))]
RESPONSES = [
    (9, 10, 11, 12, 13), (14,), (5, 6), (20, 21, 22), (1, 2, 3, 4, 5, 6, 7), (3, 4), (5, 5), (6,), (7, 8, 9, 10),
    (11, 12), (13, 14), (15, 16),
]  # fmt: skip
GROUP = 3


def a_row() -> PackedRow:
    """Four groups of different lengths, in one row."""
    return pack_row(groups_of(PROMPTS, RESPONSES, GROUP))


def policy_on(device: torch.device, family: str, dtype: str, *, grouped: bool, rounded: str = "float32") -> Policy:
    """A tiny random student, its weights rounded to `rounded` first."""
    model = build(family).to(DTYPES[rounded]).to(DTYPES[dtype]).to(device)
    policy = Policy(model)
    if not grouped:
        policy.run(Way.PLAIN)
    return policy


def without_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own attention, where flash-attn would be used."""
    monkeypatch.setattr(attention, "flash_attention", lambda device: None)


def with_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable-length kernel; in a dry run, a plain function with its arguments. Skips where no kernel is."""
    if DRY_RUN:
        monkeypatch.setattr(attention, "flash_attention", lambda device: varlen_attention)
    elif flash_attention(DEVICE) is None:
        pytest.skip("no variable-length kernel: neither flash-attn nor torch >= 2.11 on Ampere or newer")


def with_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding by captured graphs of 16 tokens each; in a dry run, by recordings that are played."""
    monkeypatch.setattr(graph_decoder, "SPAN", 16)
    if DRY_RUN:
        monkeypatch.setattr(graph_decoder, "captured", recorded)
        monkeypatch.setattr(sampling, "stays_on_device", lambda policy, drawing: policy.capturable)


def varlen_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor, max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float, causal: bool,
    window_size: tuple[int, int],
) -> torch.Tensor:  # fmt: skip
    """What flash_attn_varlen_func is documented to compute, a sequence at a time: the mask is aligned bottom right."""
    assert causal
    parts = []
    sequences = zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True)
    for (q0, q1), (k0, k1) in sequences:
        place_q = torch.arange(q1 - q0, device=query.device)[:, None] + (k1 - k0) - (q1 - q0)
        place_k = torch.arange(k1 - k0, device=query.device)[None]
        hidden = place_k > place_q
        if window_size[0] >= 0:
            hidden |= place_q - place_k > window_size[0]
        repeat = query.shape[1] // key.shape[1]
        keys, values = (t[k0:k1].repeat_interleave(repeat, 1).float() for t in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[q0:q1].float(), keys) * softmax_scale
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, values).to(query.dtype))
    return torch.cat(parts)


def worker_environment(device: torch.device) -> dict[str, str]:
    """For a process that is to see this device only."""
    from tests.support.runs import environment

    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device.type == "cpu" else {}
    paths = [str(Path(__file__).resolve().parent.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**environment(), **hidden, "PYTHONPATH": os.pathsep.join(paths)}


def relative(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    """||got - want|| / ||want|| over all tensors together."""
    assert got.keys() == want.keys()
    difference = sum(float((got[k].double() - want[k].double()).square().sum()) for k in want)
    return (difference / sum(float(want[k].double().square().sum()) for k in want)) ** 0.5


def cosine(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    """Cosine of the angle between two sets of tensors taken as vectors."""
    dot = sum(float((got[k].double() * want[k].double()).sum()) for k in want)
    norms = [sum(float(v.double().square().sum()) for v in one.values()) ** 0.5 for one in (got, want)]
    return dot / (norms[0] * norms[1])


Setting = Callable[[pytest.MonkeyPatch], Any]
KERNELS: dict[str, Setting] = {"sdpa": without_flash, "flash": with_flash}
