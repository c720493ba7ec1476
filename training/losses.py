"""Losses as pure functions over the response tokens S of one micro-batch.

Each term is a sum of token losses times weights that already hold the term's global denominator (all ranks, all
micro-batches). So the gradient does not depend on how the batch was cut; ranks add their gradients.
"""

from __future__ import annotations

import math

import torch


def at_least_float32(values: torch.Tensor) -> torch.Tensor:
    """bfloat16 logits are reduced in float32 (trap 10); float64, which tests use, stays."""
    return values if values.dtype == torch.float64 else values.float()


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
    importance_S: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clipped surrogate (PPO, arXiv 1707.06347, eq. 7), with asymmetric clipping.

    `ratio` `token`: pi/pi_b of the token. `sequence`: GSPO (arXiv 2507.18071, eq. 7), the geometric mean over the
    response `response_S` names, with the gradient of its own tokens. `importance_S`: detached weights of the samples
    (`truncated_importance`, `mixture_importance`), which multiply the clipped term, never the ratio before clipping
    (trap 6). Returns (scalar loss, bool [S] clipped tokens).
    """
    log_ratio_S = policy_logprobs_S - behavior_logprobs_S
    if ratio == "sequence":
        _, inverse_S = torch.unique(response_S, return_inverse=True)
        count = int(inverse_S.max()) + 1 if len(inverse_S) else 0
        sums = log_ratio_S.new_zeros(count).index_add(0, inverse_S, log_ratio_S)
        counts = log_ratio_S.new_zeros(count).index_add(0, inverse_S, torch.ones_like(log_ratio_S))
        log_ratio_S = (sums / counts)[inverse_S]
    ratio_S = log_ratio_S.exp()
    advantages_S = advantages_S.detach()
    clipped_S = ratio_S.clamp(1.0 - clip_low, 1.0 + clip_high)
    plain, bounded = ratio_S * advantages_S, clipped_S * advantages_S
    if importance_S is not None:
        weights_S = weights_S * importance_S.detach()
    loss = -(torch.minimum(plain, bounded) * weights_S).sum()
    return loss, (bounded < plain).detach()


def kl_loss(
    policy_logprobs_S: torch.Tensor, reference_logprobs_S: torch.Tensor, weights_S: torch.Tensor, *, estimator: str
) -> torch.Tensor:
    """KL(pi_theta || pi_ref) as a loss, from on-policy samples (Schulman, "Approximating KL divergence", 2020).

    k2 = d**2 / 2 with d = log pi_theta - log pi_ref: its gradient is, in expectation, that of the reverse KL.
    k3 = exp(-d) - 1 + d, GRPO's choice (arXiv 2402.03300, eq. 4): unbiased and >= 0 as a value; its gradient is that
    of the forward KL. k1 = d has zero expected gradient as a loss and is refused by the configuration. `full` is no
    estimate: `distillation.ReverseKL` against the reference.
    """
    difference = policy_logprobs_S - reference_logprobs_S
    if estimator == "k2":
        return (difference.square() / 2 * weights_S).sum()
    if estimator == "k3":
        return ((torch.exp(-difference) - 1 + difference) * weights_S).sum()
    raise ValueError(f"loss.kl_estimator = {estimator!r}: use k2, k3 or full (k1 has no gradient in expectation)")


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
    policy = at_least_float32(policy_logits_SV).log_softmax(-1)
    teacher = at_least_float32(teacher_logits_SV).log_softmax(-1)
    return (policy.exp() * (policy - teacher)).sum(-1)


def forward_kl(policy_logits_SV: torch.Tensor, teacher_logits_SV: torch.Tensor) -> torch.Tensor:
    """Exact KL(p_T || pi) over the vocabulary at each state, nats, float32 [S]."""
    return reverse_kl(teacher_logits_SV, policy_logits_SV)


def generalized_jsd(policy_logits_SV: torch.Tensor, teacher_logits_SV: torch.Tensor, beta: float) -> torch.Tensor:
    """Generalised Jensen-Shannon divergence at each state (GKD, arXiv 2306.13649, eq. 1), nats, float32 [S].

    beta KL(p_T || m) + (1 - beta) KL(pi || m) with m = beta p_T + (1 - beta) pi. It vanishes at both ends, where the
    paper takes its limits: 0 is the forward KL(p_T || pi), 1 the reverse KL(pi || p_T).
    """
    if beta == 0.0:
        return forward_kl(policy_logits_SV, teacher_logits_SV)
    if beta == 1.0:
        return reverse_kl(policy_logits_SV, teacher_logits_SV)
    policy = at_least_float32(policy_logits_SV).log_softmax(-1)
    teacher = at_least_float32(teacher_logits_SV).log_softmax(-1)
    mixture = torch.logaddexp(teacher + math.log(beta), policy + math.log(1.0 - beta))
    to_teacher = (teacher.exp() * (teacher - mixture)).sum(-1)
    return beta * to_teacher + (1.0 - beta) * (policy.exp() * (policy - mixture)).sum(-1)


def sampled_cross_entropy(
    policy_logits_SV: torch.Tensor, ids_SK: torch.Tensor, teacher_logprobs_SK: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy with the teacher on K of its tokens at each state (Gemma 3, arXiv 2503.19786, section 3), [S].

    The teacher's probabilities are set to zero elsewhere and renormalised over the K; the student's are of the whole
    vocabulary, so that mass which it puts elsewhere costs it. int64 ids, nats; float32 result.
    """
    target_SK = at_least_float32(teacher_logprobs_SK).softmax(-1)
    policy_SK = at_least_float32(policy_logits_SV).log_softmax(-1).gather(-1, ids_SK)
    return -(target_SK * policy_SK).sum(-1)


def tail_reverse_kl(
    policy_logits_SV: torch.Tensor, ids_SK: torch.Tensor, teacher_logprobs_SK: torch.Tensor
) -> torch.Tensor:
    """KL(pi || p_T) where only K teacher entries are known and the rest is one bucket: nats, float32 [S].

    A lower bound of the exact KL (the log-sum inequality), never negative, and with a gradient on the tail's mass, so
    that the support is not drained (trap 12). `teacher_logprobs_SK` are of the whole softmax, not renormalised.
    """
    policy_SV = at_least_float32(policy_logits_SV).log_softmax(-1)
    policy_SK, teacher_SK = policy_SV.gather(-1, ids_SK), at_least_float32(teacher_logprobs_SK)
    kept = (policy_SK.exp() * (policy_SK - teacher_SK)).sum(-1)
    # The tail's own log-sum-exp: 1 minus the kept mass would round to zero where it matters.
    rest_S = policy_SV.scatter(-1, ids_SK, -torch.inf).logsumexp(-1)
    # Rounding may leave the teacher's tail nothing, or less than nothing; at least one unit in the last place is its.
    most = 1.0 - torch.finfo(teacher_SK.dtype).eps
    teacher_rest_S = torch.log1p(-teacher_SK.exp().sum(-1).clamp(max=most))
    tail = torch.where(rest_S > -torch.inf, rest_S.exp() * (rest_S.clamp(min=-1e30) - teacher_rest_S), 0.0)
    return kept + tail


def truncated_importance(old_logprobs: torch.Tensor, behavior_logprobs: torch.Tensor, cap: float) -> torch.Tensor:
    """min(pi_old / pi_b, cap) of each token, detached: the training forward against what sampling recorded.

    Truncated importance sampling (Ionides 2008; for the mismatch of two engines: Yao et al. 2025, "Your efficient RL
    framework secretly brings you off-policy RL training"). Biased by what is cut, with bounded variance.
    """
    return torch.exp(old_logprobs - behavior_logprobs).clamp(max=cap).detach()


def mixture_importance(
    behavior_BR: torch.Tensor, sampled_BR: torch.Tensor, lengths_B: torch.Tensor, *, by: str
) -> torch.Tensor:
    """Weights pi_b / q of samples drawn from a mixture q, float32 [B, R], 0 on padding.

    `token`: of the token alone (MiniLLM, arXiv 2306.08543, section 2.2, after eq. 5), which leaves out what came before
    and after: biased, with bounded variance. `sequence`: the product over the response, the same for all its tokens:
    exact. Both log-probabilities are of the same tokens, nats, 0 on padding.
    """
    mask_BR = torch.arange(behavior_BR.shape[1])[None, :] < lengths_B[:, None]
    log_BR = torch.where(mask_BR, behavior_BR - sampled_BR, 0.0)
    if by == "sequence":
        log_BR = log_BR.sum(1, keepdim=True).expand_as(log_BR)
    elif by != "token":
        raise ValueError(f"sampling.mix_weight = {by!r}: use token or sequence")
    return torch.where(mask_BR, log_BR.exp(), 0.0)


def schedule_factor(step: int, *, kind: str, final: float, total: int) -> float:
    """Factor of a weight at step `step` (from 0): from 1 to `final` at step `total`, then constant."""
    done = min(step / max(total, 1), 1.0)
    if kind == "constant":
        return 1.0
    if kind == "linear":
        return 1.0 + (final - 1.0) * done
    if kind == "cosine":
        return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * done))
    raise ValueError(f"schedule kind {kind!r}: use constant, linear or cosine")
