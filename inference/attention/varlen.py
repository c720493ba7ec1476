"""Packed rows through a variable-length attention kernel (CUDA, bfloat16 or float16), forward and backward.

flash-attn's where it is installed, else torch's own copy of that kernel (from torch 2.11 on, Ampere or newer).

The kernel takes sequences laid end to end. Each prompt is one, causal; each response is one whose queries are its own
tokens and whose keys are its prompt's and its own, causal from the bottom right: the last query sees the last key. The
layout is tested on the CPU against a function that takes the same arguments; the kernel itself has not been run here.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

log = logging.getLogger(__name__)
Kernel = Callable[..., torch.Tensor]
LARGEST_HEAD = 256
"""Head size that both kernels take at most."""


@cache
def flash_attention(device: torch.device) -> Kernel | None:
    """A kernel with the arguments of flash-attn's `flash_attn_varlen_func` on CUDA, else None."""
    # On Turing flash-attn can be installed, and refuses each call.
    if device.type != "cuda" or not torch.cuda.is_available() or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    if importlib.util.find_spec("flash_attn") is not None:
        try:
            from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found,unused-ignore]
        except ImportError as error:  # built for another torch: its library does not load
            log.warning("flash-attn is installed and cannot be imported (%s): attention goes without it", error)
        else:
            kernel: Kernel = flash_attn_varlen_func
            return kernel
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return torch_kernel(varlen_attn)


def torch_kernel(varlen_attn: Callable[..., Any]) -> Kernel | None:
    """torch's `varlen_attn` with flash-attn's arguments; None where it has no window (before torch 2.11)."""
    parameters = inspect.signature(varlen_attn).parameters
    if "window_size" not in parameters:
        return None
    # 2.11 takes fewer key heads than query heads as they are; later versions ask to be told.
    grouped = {"enable_gqa": True} if "enable_gqa" in parameters else {}

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **settings: Any) -> torch.Tensor:
        size = query.shape[-1]
        if size % 8:  # flash-attn pads by itself
            query, key, value = (F.pad(t, (0, -size % 8)) for t in (query, key, value))
        out = varlen_attn(
            query,
            key,
            value,
            settings["cu_seqlens_q"],
            settings["cu_seqlens_k"],
            settings["max_seqlen_q"],
            settings["max_seqlen_k"],
            scale=settings["softmax_scale"],
            window_size=(settings["window_size"][0], 0),  # nothing after the query: causal
            **grouped,
        )
        return out[..., :size]

    return kernel


class VarlenLayout:
    """The sequences of a packed row: first each prompt, then each response with its prompt's keys before its own."""

    def __init__(self, parts: list[tuple[list[int], list[list[int]]]], device: torch.device) -> None:
        """`parts`: row indices of each group's prompt, and of each of its responses that has inputs."""
        queries = [prompt for prompt, _ in parts] + [response for _, responses in parts for response in responses]
        keys = [prompt for prompt, _ in parts]
        keys += [[*prompt, *response] for prompt, responses in parts for response in responses]
        flat = [i for query in queries for i in query]

        def starts(lists: list[list[int]]) -> torch.Tensor:
            lengths = torch.tensor([0, *(len(one) for one in lists)], dtype=torch.int32)
            return lengths.cumsum(0, dtype=torch.int32).to(device)

        self.query = torch.tensor(flat, dtype=torch.int64, device=device)
        self.key = torch.tensor([i for key in keys for i in key], dtype=torch.int64, device=device)
        self.place = torch.argsort(self.query)
        self.settings: dict[str, Any] = {
            "cu_seqlens_q": starts(queries),
            "cu_seqlens_k": starts(keys),
            "max_seqlen_q": max(len(query) for query in queries),
            "max_seqlen_k": max(len(key) for key in keys),
        }

    def attend(
        self,
        kernel: Kernel,
        query_THD: torch.Tensor,
        key_TKD: torch.Tensor,
        value_TKD: torch.Tensor,
        *,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """Attention output [T, H, D] in the row's order. flash-attn's window counts the tokens before the query."""
        out = kernel(
            query_THD[self.query],
            key_TKD[self.key],
            value_TKD[self.key],
            **self.settings,
            softmax_scale=scale,
            causal=True,
            window_size=(-1, -1) if window is None else (window - 1, 0),
        )
        return out[self.place]
