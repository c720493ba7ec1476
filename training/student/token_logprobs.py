"""Log-probability of the chosen token and the entropy of its distribution, with one [S, V] float32 tensor kept."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable


class TokenLogprobs(torch.autograd.Function):
    """log softmax(logits / temperature) at the labels, and that distribution's entropy (no gradient through it).

    What is kept for the backward pass is exp(logit - largest) and its sum: the gradient of the logits is
    (1[label] - p) / temperature, made in one pass. With `overwrite`, float32 logits at temperature 1 are overwritten:
    the caller must not read them again.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_SV: torch.Tensor, labels_S: torch.Tensor, temperature: float, overwrite: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 [S] each, nats."""
        shifted = logits_SV.detach().float()
        if temperature != 1.0:
            shifted = shifted / temperature
        elif shifted.dtype == logits_SV.dtype and not overwrite:
            shifted = shifted.clone()
        shifted.sub_(shifted.amax(-1, keepdim=True))
        weights = shifted.exp()
        total_S = weights.sum(-1)
        chosen = shifted.gather(-1, labels_S[:, None])[:, 0] - total_S.log()
        # sum of p log p as a product of rows: no third [S, V] tensor.
        mean_S = (weights[:, None, :] @ shifted[:, :, None])[:, 0, 0] / total_S
        ctx.save_for_backward(weights, total_S, labels_S)
        ctx.temperature, ctx.dtype = temperature, logits_SV.dtype
        entropy = total_S.log() - mean_S
        ctx.mark_non_differentiable(entropy)
        return chosen, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_S: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradient of the logits, in their type."""
        weights, total_S, labels_S = ctx.saved_tensors
        grad_S = grad_S / ctx.temperature
        grad_SV = weights * (-grad_S / total_S)[:, None]
        grad_SV.scatter_add_(1, labels_S[:, None], grad_S[:, None])
        return grad_SV.to(ctx.dtype), None, None, None
