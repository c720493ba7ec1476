"""Losses as pure functions over the response tokens S of one micro-batch, and terms that compare distributions.

Each term is a sum of token losses times weights that already hold the term's global denominator (all ranks, all
micro-batches). So the gradient does not depend on how the batch was cut; ranks add their gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from configs.schema import LossConfig
from rewards.minillm import at_least_float32, reverse_kl, tail_reverse_kl


def token_weights(
    lengths_B: torch.Tensor, aggregation: str, *, tokens: float, responses: float, constant: float
) -> torch.Tensor:
    """Weight of each token's policy loss, float32 [S].

    `tokens` and `responses` are counts of the whole mini-batch over all ranks. `token`: mean over all tokens (DAPO,
    arXiv 2503.14476); `sequence`: mean over a response, then over responses (GRPO); `constant`: sum over a response
    divided by `constant` tokens, then mean over responses (Dr. GRPO, arXiv 2503.20783). An empty response counts as a
    response and weighs nothing.
    """
    if aggregation == "token":
        weight_B = torch.full((len(lengths_B),), 1.0 / max(tokens, 1.0))
    elif aggregation == "sequence":
        weight_B = 1.0 / (lengths_B.clamp(min=1).float() * max(responses, 1.0))
    else:
        weight_B = torch.full((len(lengths_B),), 1.0 / (constant * max(responses, 1.0)))
    return weight_B.repeat_interleave(lengths_B)


@dataclass(frozen=True)
class PolicyTokens:
    """The response tokens of one packed row, as the clipped surrogate sees them; all [S]."""

    policy_logprobs_S: torch.Tensor
    """float32 log pi_theta, nats, with its gradient."""
    old_logprobs_S: torch.Tensor
    """float32 what the ratio is taken to: at sampling time, or by the training forward before the first update."""
    advantages_S: torch.Tensor
    """float32."""
    weights_S: torch.Tensor
    """float32 `token_weights`, times the importance weights of samples that the policy itself did not draw."""
    response_S: torch.Tensor
    """int64 response of each token."""


def policy_loss(tokens: PolicyTokens, config: LossConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Clipped surrogate (PPO, arXiv 1707.06347, eq. 7), with asymmetric clipping.

    `loss.ratio` `token`: pi/pi_old of the token. `sequence`: GSPO (arXiv 2507.18071, eq. 7), the geometric mean over
    the response, with the gradient of its own tokens. Weights are detached and multiply the clipped term, never the
    ratio before clipping (trap 6). Returns (scalar loss, bool [S] clipped tokens).
    """
    log_ratio_S = tokens.policy_logprobs_S - tokens.old_logprobs_S
    if config.ratio == "sequence":
        _, inverse_S = torch.unique(tokens.response_S, return_inverse=True)
        count = int(inverse_S.max()) + 1 if len(inverse_S) else 0
        sums = log_ratio_S.new_zeros(count).index_add(0, inverse_S, log_ratio_S)
        counts = log_ratio_S.new_zeros(count).index_add(0, inverse_S, torch.ones_like(log_ratio_S))
        log_ratio_S = (sums / counts)[inverse_S]
    ratio_S = log_ratio_S.exp()
    advantages_S = tokens.advantages_S.detach()
    clipped_S = ratio_S.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    plain, bounded = ratio_S * advantages_S, clipped_S * advantages_S
    loss = -(torch.minimum(plain, bounded) * tokens.weights_S.detach()).sum()
    return loss, (bounded < plain).detach()


def kl_loss(
    policy_logprobs_S: torch.Tensor, reference_logprobs_S: torch.Tensor, weights_S: torch.Tensor, *, estimator: str
) -> torch.Tensor:
    """KL(pi_theta || pi_ref) as a loss, from on-policy samples (Schulman, "Approximating KL divergence", 2020).

    k2 = d**2 / 2 with d = log pi_theta - log pi_ref: its gradient is, in expectation, that of the reverse KL. `k3`:
    its gradient is that of the forward KL. k1 = d has zero expected gradient as a loss and is refused by the
    configuration. `full` is no estimate: `ReverseKL` against the reference.
    """
    if estimator == "k2":
        return ((policy_logprobs_S - reference_logprobs_S).square() / 2 * weights_S).sum()
    return (k3(policy_logprobs_S, reference_logprobs_S) * weights_S).sum()


def k3(policy_logprobs_S: torch.Tensor, reference_logprobs_S: torch.Tensor) -> torch.Tensor:
    """exp(-d) - 1 + d with d = log pi - log pi_ref, [S]: on samples of pi an unbiased estimate of KL(pi || pi_ref) that
    is never negative (GRPO, arXiv 2402.03300, eq. 4)."""
    difference_S = policy_logprobs_S - reference_logprobs_S
    return torch.exp(-difference_S) - 1 + difference_S


def value_loss(
    values_S: torch.Tensor, old_values_S: torch.Tensor, returns_S: torch.Tensor, weights_S: torch.Tensor, *, clip: float
) -> torch.Tensor:
    """PPO's clipped value loss: half the larger of the squared errors of the new and of the clipped value."""
    bounded = old_values_S + (values_S - old_values_S).clamp(-clip, clip)
    worst = torch.maximum((values_S - returns_S).square(), (bounded - returns_S).square())
    return 0.5 * (worst * weights_S).sum()


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


def truncated_importance(old_logprobs: torch.Tensor, behavior_logprobs: torch.Tensor, cap: float) -> torch.Tensor:
    """min(pi_old / pi_b, cap) of each token, detached: the training forward against what sampling recorded.

    Truncated importance sampling (Ionides 2008; for the mismatch of two engines: Yao et al. 2025, "Your efficient RL
    framework secretly brings you off-policy RL training"). Biased by what is cut, with bounded variance.
    """
    return torch.exp(old_logprobs - behavior_logprobs).clamp(max=cap).detach()


TokenTerm = Callable[[torch.Tensor, slice], torch.Tensor]
"""From the policy's vocabulary logits [C, V] (the model's type, temperature 1) at some of a row's S response tokens,
and the slice of S that they are, to one number for each, float32 [C] nats. The functions below that end in `_term` make
them, each for the tokens of one row; they compare plain softmaxes (temperature 1), because that is the policy that is
distilled."""
Head = Callable[[torch.Tensor], torch.Tensor]
NEVER = -1e30
"""Logit of a column that no token has. Finite, because 0 times its log-probability has to be 0."""


@dataclass(frozen=True)
class OutputLayer:
    """The head of a model whose logits are a product with its output layer."""

    weight_VD: torch.Tensor
    """[V, D]; its type is the type of the product, its device where that is made."""
    unknown_V: torch.Tensor | None = None
    """bool, true for columns that no token has."""
    softcap: float | None = None
    """c where logits are c * tanh(product / c) (Gemma 2)."""

    def __call__(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        """Logits [S, V]."""
        made = hidden_SD.to(self.weight_VD) @ self.weight_VD.T
        made = made if self.softcap is None else self.softcap * torch.tanh(made / self.softcap)
        return without_columns(made, self.unknown_V)


def without_columns(logits_SV: torch.Tensor, unknown_V: torch.Tensor | None) -> torch.Tensor:
    """The logits with no probability on the unknown columns."""
    return logits_SV if unknown_V is None else logits_SV.masked_fill(unknown_V.to(logits_SV.device), NEVER)


@dataclass(frozen=True)
class WholeDistribution:
    """A frozen model's distribution over the whole vocabulary, as last hidden states and what makes logits of them."""

    hidden_SD: torch.Tensor
    """[S, D] last hidden state that predicts each response token."""
    head: Head
    """From [C, D] to logits [C, V], without a gradient."""

    def beside(self, policy_CV: torch.Tensor, piece: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """The policy's logits at some of the tokens and this model's, of the entries that both have: one tokenizer may
        be padded differently (trap 26)."""
        own_CV = self.head(self.hidden_SD[piece])
        shared = min(policy_CV.shape[-1], own_CV.shape[-1])
        return policy_CV[:, :shared], own_CV[:, :shared]


def reverse_kl_term(other: WholeDistribution) -> TokenTerm:
    """Exact KL(pi || p) at each state: MiniLLM's single-step part (arXiv 2306.08543, eq. 3), or a full KL penalty. p is
    `other`."""
    return lambda logits_CV, piece: reverse_kl(*other.beside(logits_CV, piece))


def jsd_term(teacher: WholeDistribution, beta: float) -> TokenTerm:
    """GKD's divergence to the teacher (`generalized_jsd`)."""
    return lambda logits_CV, piece: generalized_jsd(*teacher.beside(logits_CV, piece), beta)


def sampled_ce_term(teacher: WholeDistribution, count: int, seed: int) -> TokenTerm:
    """Gemma 3's distillation: cross-entropy on `count` teacher tokens at each position, drawn without replacement by
    Gumbel top-k (arXiv 1903.06059); on all where the vocabulary has fewer. `seed`: of this row's draws: recomputing a
    chunk in the backward pass draws the same tokens."""

    def term(logits_CV: torch.Tensor, piece: slice) -> torch.Tensor:
        policy_CV, teacher_CV = teacher.beside(logits_CV, piece)
        logprobs_CV = at_least_float32(teacher_CV).log_softmax(-1)
        generator = torch.Generator(logprobs_CV.device).manual_seed(seed + piece.start)
        uniform = torch.rand(logprobs_CV.shape, generator=generator, device=logprobs_CV.device)
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
        ids = (logprobs_CV + gumbel).topk(min(count, logprobs_CV.shape[-1]), -1).indices
        return sampled_cross_entropy(policy_CV, ids, logprobs_CV.gather(-1, ids))

    return term


def tail_kl_term(ids_SK: torch.Tensor, logprobs_SK: torch.Tensor) -> TokenTerm:
    """KL(pi || p_T), at most the exact one, from K teacher entries (int64 ids, float32 log-probabilities) and the mass
    of the rest: for a teacher whose hidden states are not sent."""
    return lambda logits_CV, piece: tail_reverse_kl(logits_CV, ids_SK[piece], logprobs_SK[piece])


def schedule_factor(step: int, *, kind: str, final: float, total: int) -> float:
    """Factor of a weight at step `step` (from 0): from 1 to `final` at step `total`, then constant."""
    done = min(step / max(total, 1), 1.0)
    if kind == "constant":
        return 1.0
    if kind == "linear":
        return 1.0 + (final - 1.0) * done
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * done))
