"""Attention of a group's responses to the one copy of their prompt and to themselves, forward and backward.

Shapes: N groups, G responses, r tokens of a response, P of a prompt (all padded on the right), K key-value heads, q
query heads for each of them, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

MAX_WEIGHTS = 1 << 24
"""Attention weights that are alive at a time, unless a single key-value head of a group has more."""


class SharedPromptAttention(torch.autograd.Function):
    """softmax([Q Kp' | Q Ks'] scale + mask) [Vp; Vs], with the prompt's keys and values neither copied nor expanded.

    Only the inputs, the output and each query's logsumexp are kept for the backward pass, which makes the weights
    again as exp(score - logsumexp) (FlashAttention, arXiv 2205.14135, section 3.1 and appendix B.2).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_NKGrqD: torch.Tensor,
        prompt_key_NKPD: torch.Tensor,
        prompt_value_NKPD: torch.Tensor,
        key_NKGrD: torch.Tensor,
        value_NKGrD: torch.Tensor,
        prompt_mask: torch.Tensor | None,
        own_mask_rr: torch.Tensor,
        scale: float,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Output [N, K, G, r, q, D]. Masks are added to the scores: `prompt_mask` [N, G*r, P], `own_mask_rr` [r, r].
        `softcap`: scores are softcap * tanh(score / softcap) before that."""
        out = torch.empty_like(query_NKGrqD)
        K = query_NKGrqD.shape[1]
        logsumexp = query_NKGrqD.new_empty(query_NKGrqD.shape[:5], dtype=_sum_type(query_NKGrqD))
        inputs = (query_NKGrqD, prompt_key_NKPD, prompt_value_NKPD, key_NKGrD, value_NKGrD)
        for part in _parts(query_NKGrqD, prompt_key_NKPD.shape[2]):
            q, kp, vp, ks, vs = (_heads(t, part) for t in inputs)
            scores = _scores(q, kp, ks, (_mask_of(prompt_mask, part, K), own_mask_rr), (scale, softcap))
            top = scores.amax(-1, keepdim=True)
            weights = scores.sub_(top).exp_()
            total = weights.sum(-1, keepdim=True)
            _heads(logsumexp[..., None], part).copy_(top.add_(total.log()).view(*q.shape[:-1], 1))
            _heads(out, part).copy_(_weighted(weights.div_(total).to(q.dtype), vp, vs, q.shape))
        ctx.save_for_backward(*inputs, out, logsumexp, prompt_mask, own_mask_rr)
        ctx.scale, ctx.softcap = scale, softcap
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of query, prompt keys and values, own keys and values."""
        *inputs, out, logsumexp, prompt_mask, own_mask_rr = ctx.saved_tensors
        K, P = inputs[0].shape[1], inputs[1].shape[2]
        grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs]
        for part in _parts(inputs[0], P):
            q, kp, vp, ks, vs = (_heads(t, part) for t in inputs)
            go, o = _heads(grad_out, part), _heads(out, part)
            M, G, r, _, D = q.shape
            weights = _scores(q, kp, ks, (_mask_of(prompt_mask, part, K), own_mask_rr), (ctx.scale, ctx.softcap))
            # d(c tanh(s / c)) / ds = 1 - tanh^2; what is masked has weight 0.
            slope = None if ctx.softcap is None else 1.0 - (weights / ctx.softcap).clamp(-1.0, 1.0).square()
            weights.sub_(_heads(logsumexp[..., None], part).reshape(*weights.shape[:-1], 1)).exp_()
            q_all, q_own = q.reshape(M, -1, D), q.reshape(M * G, -1, D)
            g_all, g_own = go.reshape(M, -1, D), go.reshape(M * G, -1, D)
            halved = weights.to(q.dtype)
            grad_vp = halved[..., :P].reshape(M, -1, P).transpose(1, 2) @ g_all
            grad_vs = halved[..., P:].transpose(1, 2) @ g_own
            from_prompt = (g_all @ vp.transpose(1, 2)).view(M * G, -1, P)
            from_own = g_own @ vs.reshape(M * G, r, D).transpose(1, 2)
            grad_scores = torch.cat([from_prompt, from_own], -1).to(weights.dtype)
            # The softmax's gradient: w (dw - sum(w dw)), and that sum is grad_out . out.
            inner = (go.to(weights.dtype) * o).sum(-1).reshape(M * G, -1, 1)
            grad_scores = grad_scores.sub_(inner).mul_(weights).mul_(ctx.scale)
            grad_scores = (grad_scores if slope is None else grad_scores.mul_(slope)).to(q.dtype)
            to_prompt, to_own = grad_scores[..., :P].reshape(M, -1, P), grad_scores[..., P:]
            grad_q = torch.baddbmm((to_prompt @ kp).view(M * G, -1, D), to_own, ks.reshape(M * G, r, D))
            grad_kp, grad_ks = to_prompt.transpose(1, 2) @ q_all, to_own.transpose(1, 2) @ q_own
            results = (grad_q, grad_kp, grad_vp, grad_ks, grad_vs)
            for grad, result in zip(grads, results, strict=True):
                target = _heads(grad, part)
                target.copy_(result.view(target.shape))
        return (*grads, None, None, None, None)


def _sum_type(tensor: torch.Tensor) -> torch.dtype:
    """Softmax is reduced in float32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _parts(query_NKGrqD: torch.Tensor, prompt: int) -> list[slice]:
    """Slices of the N * K pairs of group and head whose weights are made at a time."""
    N, K, G, r, per_kv, _ = query_NKGrqD.shape
    step = max(1, MAX_WEIGHTS // max(G * r * per_kv * (prompt + r), 1))
    return [slice(start, start + step) for start in range(0, N * K, step)]


def _heads(tensor: torch.Tensor, part: slice) -> torch.Tensor:
    """Some of the N * K pairs: [M, ...], a view."""
    return tensor.flatten(0, 1)[part]


def _mask_of(prompt_mask: torch.Tensor | None, part: slice, kv_heads: int) -> torch.Tensor | None:
    """The prompt mask of each pair in the slice, [M, G*r, 1, P]."""
    if prompt_mask is None:
        return None
    pairs = torch.arange(prompt_mask.shape[0] * kv_heads, device=prompt_mask.device)[part]
    return prompt_mask[pairs // kv_heads][:, :, None]


def _scores(
    q_MGrqD: torch.Tensor,
    kp_MPD: torch.Tensor,
    ks_MGrD: torch.Tensor,
    masks: tuple[torch.Tensor | None, torch.Tensor],
    factors: tuple[float, float | None],
) -> torch.Tensor:
    """Masked scores [M*G, r*q, P + r] in float32 at least, a new tensor. `masks`: of the prompt, and own [r, r];
    `factors`: scale and softcap."""
    (prompt_mask, own_mask_rr), (scale, softcap) = masks, factors
    M, G, r, per_kv, D = q_MGrqD.shape
    P = kp_MPD.shape[1]
    scores = torch.empty(M * G, r * per_kv, P + r, dtype=_sum_type(q_MGrqD), device=q_MGrqD.device)
    to_prompt = q_MGrqD.reshape(M, -1, D) @ kp_MPD.transpose(1, 2)
    torch.mul(to_prompt.view(M * G, -1, P), scale, out=scores[..., :P])
    to_own = q_MGrqD.reshape(M * G, -1, D) @ ks_MGrD.reshape(M * G, r, D).transpose(1, 2)
    torch.mul(to_own, scale, out=scores[..., P:])
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if prompt_mask is not None:
        scores[..., :P].view(M, G * r, per_kv, P).add_(prompt_mask)
    scores[..., P:].unflatten(1, (r, per_kv)).add_(own_mask_rr[:, None])
    return scores


def _weighted(weights: torch.Tensor, vp_MPD: torch.Tensor, vs_MGrD: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Weighted values [M, G, r, q, D]."""
    M, G, r, _, D = shape
    P = vp_MPD.shape[1]
    prompt = weights.view(M, -1, weights.shape[-1])[..., :P] @ vp_MPD
    return torch.baddbmm(prompt.view(M * G, -1, D), weights[..., P:], vs_MGrD.reshape(M * G, r, D)).view(shape)
