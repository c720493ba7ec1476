"""MiniLLM (Gu et al., arXiv 2306.08543): the policy gradient of the reverse KL KL(pi_theta || p_T), in one place.

r_t = log p_T(y_t|.) - log pi_b(y_t|.). The gradient splits (eq. 3) into a single-step part, the exact KL over the
vocabulary at each state, differentiated directly (`reverse_kl`), and a long part: log pi(y_t) credited with the rewards
that follow. The long part is length-normalised (section 2.2) so that short responses are not favoured. Samples may come
from a mixture of teacher and student (`mixed_logprobs`) and carry the weight of what was really drawn
(`mixture_importance`).
"""

from __future__ import annotations

import math

import torch

from rewards.base import RewardInput, RewardOutput
from rewards.tokens import discounted_sum, following, sum_by_response


def at_least_float32(values: torch.Tensor) -> torch.Tensor:
    """bfloat16 logits are reduced in float32 (trap 10); float64, which tests use, stays."""
    return values if values.dtype == torch.float64 else values.float()


def minillm_rewards(inputs: RewardInput, *, gamma: float, length_normalize: bool, single_step: bool) -> RewardOutput:
    """Rewards for PPO and credited returns for GRPO.

    With `single_step` the immediate reward is left to the exact term in the loss: a token is credited with the
    rewards after it only, so r_t is not counted twice. Without it, a token's own reward is part of its credit.
    """
    lengths_B = inputs.lengths_B
    reward_S = inputs.teacher_logprobs_S - inputs.behavior_logprobs_S
    returns_S = mean_return(reward_S, lengths_B, gamma=gamma, normalize=length_normalize, first=1 if single_step else 0)
    # Token t takes r_{t+1}: an advantage estimator that sums from t then sums what follows t.
    credited_S = gamma * following(reward_S, lengths_B) if single_step else reward_S
    return RewardOutput(credited_S, returns_S, {"minillm": sum_by_response(reward_S, lengths_B)})


def mean_return(
    rewards_S: torch.Tensor, lengths_B: torch.Tensor, *, gamma: float, normalize: bool, first: int
) -> torch.Tensor:
    """Discounted sum of rewards from t + `first` to the end, divided by the same sum of ones if `normalize`.

    out[b, t] = sum_{k >= t + first} gamma**(k - t - first) r_k / sum_{k >= t + first} gamma**(k - t - first), over the
    tokens of response b; 0 where nothing follows. Powers are relative to t, so long responses do not underflow, and
    numerator and denominator are discounted alike. `first` = 1 is MiniLLM's long part, 0 includes the token itself.
    """
    sums_S, counts_S = (
        discounted_sum(values_S, lengths_B, gamma) for values_S in (rewards_S, torch.ones_like(rewards_S))
    )
    if first == 1:
        sums_S, counts_S = following(sums_S, lengths_B), following(counts_S, lengths_B)
    return sums_S / counts_S.clamp(min=1) if normalize else sums_S  # at least 1 where anything follows


def reverse_kl(policy_logits_SV: torch.Tensor, teacher_logits_SV: torch.Tensor) -> torch.Tensor:
    """Exact KL(pi || p_T) over the vocabulary at each state, nats, float32 [S].

    Logits of the same vocabulary entries, any dtype; reduced in float32. The single-step part (eq. 3) is this,
    differentiated through the policy's logits.
    """
    policy = at_least_float32(policy_logits_SV).log_softmax(-1)
    teacher = at_least_float32(teacher_logits_SV).log_softmax(-1)
    return (policy.exp() * (policy - teacher)).sum(-1)


def tail_reverse_kl(
    policy_logits_SV: torch.Tensor, ids_SK: torch.Tensor, teacher_logprobs_SK: torch.Tensor
) -> torch.Tensor:
    """KL(pi || p_T) where only K teacher entries are known and the rest is one bucket: nats, float32 [S].

    A lower bound of the exact KL (the log-sum inequality), never negative, and with a gradient on the tail's mass, so
    that the support is not drained (trap 12). `teacher_logprobs_SK` are of the whole softmax, not renormalised. Ids
    past the policy's columns (a teacher that is padded further) are entries to which it gives nothing.
    """
    policy_SV = at_least_float32(policy_logits_SV).log_softmax(-1)
    has_SK = ids_SK < policy_SV.shape[-1]
    # In such an id's place one that is there already: its column is taken out of the rest twice, which is once.
    ids_SK = torch.where(has_SK, ids_SK, ids_SK.gather(-1, has_SK.int().argmax(-1, keepdim=True)))
    policy_SK = policy_SV.gather(-1, ids_SK).masked_fill(~has_SK, -1e30)
    teacher_SK = at_least_float32(teacher_logprobs_SK)
    kept = (policy_SK.exp() * (policy_SK - teacher_SK)).sum(-1)
    # The tail's own log-sum-exp: 1 minus the kept mass would round to zero where it matters.
    rest_S = policy_SV.scatter(-1, ids_SK, -torch.inf).logsumexp(-1)
    # Rounding may leave the teacher's tail nothing, or less than nothing; at least one unit in the last place is its.
    most = 1.0 - torch.finfo(teacher_SK.dtype).eps
    teacher_rest_S = torch.log1p(-teacher_SK.exp().sum(-1).clamp(max=most))
    tail = torch.where(rest_S > -torch.inf, rest_S.exp() * (rest_S.clamp(min=-1e30) - teacher_rest_S), 0.0)
    return kept + tail


def mixed_logprobs(policy_AV: torch.Tensor, teacher_AV: torch.Tensor, alpha: float) -> torch.Tensor:
    """log(alpha p_T + (1 - alpha) pi), what teacher-mixed sampling draws from (section 2.2), nats, float32 [A, V].

    A teacher whose vocabulary is padded otherwise has its first V entries mixed in.
    """
    out_AV = policy_AV + math.log(1.0 - alpha)
    shared = min(out_AV.shape[-1], teacher_AV.shape[-1])
    out_AV[:, :shared] = torch.logaddexp(out_AV[:, :shared], teacher_AV[:, :shared] + math.log(alpha))
    return out_AV


def mixture_importance(
    behavior_S: torch.Tensor, sampled_S: torch.Tensor, lengths_B: torch.Tensor, *, by: str
) -> torch.Tensor:
    """Weights pi_b / q of samples drawn from a mixture q token by token, float32 [S].

    `token`: of the token alone (section 2.2, after eq. 5), which leaves out what came before and after: biased, with
    bounded variance. `sequence`: the product over the response, the same for all its tokens: exact. Both
    log-probabilities are of the same tokens, nats.
    """
    log_S = behavior_S - sampled_S
    if by == "sequence":
        log_S = sum_by_response(log_S, lengths_B).repeat_interleave(lengths_B)
    return log_S.exp()


def response_mixture_importance(
    behavior_S: torch.Tensor, teacher_S: torch.Tensor, lengths_B: torch.Tensor, alpha: float
) -> torch.Tensor:
    """Weights pi_b / q of responses that were the teacher's with probability alpha, float32 [S].

    q(y) = alpha p_T(y) + (1 - alpha) pi(y): the weight is the same for all tokens of y and at most 1 / (1 - alpha).
    """
    gap_B = sum_by_response(teacher_S - behavior_S, lengths_B)
    log_q_B = torch.logaddexp(gap_B + math.log(alpha), torch.full_like(gap_B, math.log(1.0 - alpha)))
    return torch.exp(-log_q_B).repeat_interleave(lengths_B)
