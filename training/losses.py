"""Losses as pure functions over the response tokens S of one micro-batch.

Each term is a sum of token losses times weights that already hold the term's global denominator (all ranks, all
micro-batches). So the gradient does not depend on how the batch was cut; ranks add their gradients.
"""

from __future__ import annotations

import torch


def token_weights(
    lengths_B: torch.Tensor, longest: int, *, aggregation: str, tokens: float, responses: float, constant: float
) -> torch.Tensor:
    """Weight of each token's policy loss, float32 [B, R], 0 on padding.

    `tokens` and `responses` are counts of the whole mini-batch over all ranks. `token`: mean over all tokens (DAPO,
    arXiv 2503.14476); `sequence`: mean over a response, then over responses (GRPO); `constant`: sum over a response
    divided by `constant` tokens, then mean over responses (Dr. GRPO, arXiv 2503.20783). An empty response counts as a
    response and weighs nothing.
    """
    mask_BR = torch.arange(longest)[None, :] < lengths_B[:, None]
    if aggregation == "token":
        weight_B = torch.full((len(lengths_B),), 1.0 / max(tokens, 1.0))
    elif aggregation == "sequence":
        weight_B = 1.0 / (lengths_B.clamp(min=1).float() * max(responses, 1.0))
    elif aggregation == "constant":
        weight_B = torch.full((len(lengths_B),), 1.0 / (constant * max(responses, 1.0)))
    else:
        raise ValueError(f"loss.aggregation = {aggregation!r}: use token, sequence or constant")
    return torch.where(mask_BR, weight_B[:, None], 0.0)


def policy_loss(
    policy_logprobs_S: torch.Tensor,
    behavior_logprobs_S: torch.Tensor,
    advantages_S: torch.Tensor,
    weights_S: torch.Tensor,
    response_S: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    ratio: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clipped surrogate (PPO, arXiv 1707.06347, eq. 7), with asymmetric clipping.

    `ratio` `token`: pi/pi_b of the token. `sequence`: GSPO (arXiv 2507.18071, eq. 7), the geometric mean over the
    response `response_S` names, with the gradient of its own tokens. Returns (scalar loss, bool [S] clipped tokens).
    """
    log_ratio_S = policy_logprobs_S - behavior_logprobs_S
    if ratio == "sequence":
        _, inverse_S = torch.unique(response_S, return_inverse=True)
        count = int(inverse_S.max()) + 1 if len(inverse_S) else 0
        sums = log_ratio_S.new_zeros(count).index_add(0, inverse_S, log_ratio_S)
        counts = log_ratio_S.new_zeros(count).index_add(0, inverse_S, torch.ones_like(log_ratio_S))
        log_ratio_S = (sums / counts)[inverse_S]
    ratio_S = log_ratio_S.exp()
    clipped_S = ratio_S.clamp(1.0 - clip_low, 1.0 + clip_high)
    plain, bounded = ratio_S * advantages_S, clipped_S * advantages_S
    loss = -(torch.minimum(plain, bounded) * weights_S).sum()
    return loss, (bounded < plain).detach()


def kl_loss(
    policy_logprobs_S: torch.Tensor, reference_logprobs_S: torch.Tensor, weights_S: torch.Tensor, *, estimator: str
) -> torch.Tensor:
    """KL(pi_theta || pi_ref) as a loss, from on-policy samples (Schulman, "Approximating KL divergence", 2020).

    k2 = d**2 / 2 with d = log pi_theta - log pi_ref: its gradient is, in expectation, that of the reverse KL.
    k3 = exp(-d) - 1 + d, GRPO's choice (arXiv 2402.03300, eq. 4): unbiased and >= 0 as a value; its gradient is that
    of the forward KL. k1 = d has zero expected gradient as a loss and is refused by the configuration.
    """
    difference = policy_logprobs_S - reference_logprobs_S
    if estimator == "k2":
        return (difference.square() / 2 * weights_S).sum()
    if estimator == "k3":
        return ((torch.exp(-difference) - 1 + difference) * weights_S).sum()
    raise ValueError(f"loss.kl_estimator = {estimator!r}: use k2 or k3 (k1 has no gradient in expectation)")


def value_loss(
    values_S: torch.Tensor, old_values_S: torch.Tensor, returns_S: torch.Tensor, weights_S: torch.Tensor, *, clip: float
) -> torch.Tensor:
    """PPO's clipped value loss: half the larger of the squared errors of the new and of the clipped value."""
    bounded = old_values_S + (values_S - old_values_S).clamp(-clip, clip)
    worst = torch.maximum((values_S - returns_S).square(), (bounded - returns_S).square())
    return 0.5 * (worst * weights_S).sum()


def reverse_kl(policy_logits_SV: torch.Tensor, teacher_logits_SV: torch.Tensor) -> torch.Tensor:
    """Exact KL(pi || p_T) over the vocabulary at each state, nats, float32 [S].

    Logits of the same vocabulary entries, any dtype; reduced in float32. MiniLLM's single-step part (arXiv
    2306.08543, eq. 3) is this, differentiated through the policy's logits.
    """
    policy = policy_logits_SV.float().log_softmax(-1)
    teacher = teacher_logits_SV.float().log_softmax(-1)
    return (policy.exp() * (policy - teacher)).sum(-1)
