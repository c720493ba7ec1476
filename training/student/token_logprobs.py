"""What is computed of vocabulary logits, a few rows at a time and with one [S, V] tensor kept for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from training.losses import TokenTerm

ROWS = 64
"""Rows of logits that are worked on at a time on a CPU, whose cache holds them; elsewhere GPU_ROWS."""
TERM_ROWS = 128
"""The same where another model's output layer, which is read each time, makes logits to compare with."""
GPU_ROWS = 1024


class TokenLogprobs(torch.autograd.Function):
    """log softmax(logits / temperature) at the labels, and that distribution's entropy (no gradient through it).

    What is kept for the backward pass is exp(logit - largest) and its sum: the gradient of the logits is
    (1[label] - p) / temperature, made in one pass. It is made a few rows at a time, which stay in the processor's cache
    meanwhile. float32 logits with a gradient are overwritten: the caller must not read them again.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_SV: torch.Tensor, labels_S: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 [S] each, nats."""
        logits_SV = logits_SV.detach()
        wanted, weights = ctx.needs_input_grad[0], None
        if wanted:
            own = logits_SV.dtype == torch.float32
            weights = logits_SV if own else torch.empty_like(logits_SV, dtype=torch.float32)
        chosen, total, entropy = [], [], []
        step, count = rows_at_once(logits_SV.device, ROWS), len(logits_SV)
        for rows in (slice(start, start + step) for start in range(0, count, step)):
            shifted = logits_SV[rows].float()
            shifted = shifted / temperature if temperature != 1.0 else shifted
            shifted = shifted - shifted.amax(-1, keepdim=True)
            powers = torch.exp(shifted, out=None if weights is None else weights[rows])
            total_S = powers.sum(-1)
            chosen.append(shifted.gather(-1, labels_S[rows, None])[:, 0] - total_S.log())
            # sum of p log p as a product of rows: no further [S, V] tensor.
            entropy.append(total_S.log() - (powers[:, None, :] @ shifted[:, :, None])[:, 0, 0] / total_S)
            total.append(total_S)
        nothing = logits_SV.new_zeros(0, dtype=torch.float32)
        chosen_S, total_S, entropy_S = (torch.cat([nothing, *parts]) for parts in (chosen, total, entropy))
        if wanted:
            ctx.save_for_backward(weights, total_S, labels_S)
        ctx.temperature, ctx.dtype = temperature, logits_SV.dtype
        ctx.mark_non_differentiable(entropy_S)
        return chosen_S, entropy_S

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_S: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradient of the logits, in their type."""
        weights, total_S, labels_S = ctx.saved_tensors
        grad_S = grad_S / ctx.temperature
        grad_SV = weights.mul_((-grad_S / total_S)[:, None])
        grad_SV.scatter_add_(1, labels_S[:, None], grad_S[:, None])
        return grad_SV.to(ctx.dtype), None, None


class RowTerm(torch.autograd.Function):
    """A `TokenTerm` of logits, a few rows at a time: its gradient is made together with its value, so that one [S, V]
    tensor is kept for the backward pass and not each of the term's steps.

    The term is called `parts` times, for no rows too: under ZeRO 3 a reference's output layer is gathered in it, by all
    ranks together.
    """

    @staticmethod
    def forward(ctx: Any, logits_SV: torch.Tensor, term: TokenTerm, piece: slice, parts: int) -> torch.Tensor:
        """float32 [S]."""
        wanted, count = ctx.needs_input_grad[0], len(logits_SV)
        grad_SV, values = torch.empty_like(logits_SV) if wanted else None, []
        for rows in (slice(count * i // parts, count * (i + 1) // parts) for i in range(parts)):
            part = logits_SV[rows].detach().requires_grad_(wanted)
            # The checkpoint of a chunk would take what is saved here, and recompute the chunk to give it back.
            with torch.set_grad_enabled(wanted), saved_tensors_hooks(_itself, _itself):
                value_S = term(part, slice(piece.start + rows.start, piece.start + rows.stop))
            if grad_SV is not None and len(part):
                (grad_SV[rows],) = torch.autograd.grad(value_S, part, torch.ones_like(value_S))
            values.append(value_S.detach())
        if wanted:
            ctx.save_for_backward(grad_SV)
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_S: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_SV,) = ctx.saved_tensors
        return grad_SV.mul_(grad_S[:, None]), None, None, None


def _itself(saved: torch.Tensor) -> torch.Tensor:
    return saved


def rows_at_once(device: torch.device, rows: int) -> int:
    """ROWS or TERM_ROWS on a CPU, GPU_ROWS elsewhere."""
    return rows if device.type == "cpu" else GPU_ROWS
