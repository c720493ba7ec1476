"""What each `--recipe` does with the parts: reinforcement learning, and the baselines that it has to beat.

A recipe is a row of this table, not a trainer of its own: whose answers are learnt from, which divergence to the
teacher's distribution is in the loss, whether there is a policy gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from configs.schema import RunConfig
from training.composite import LossWeights, loss_weights
from training.distillation import GeneralizedJSD, ReverseKL, SampledCrossEntropy, WholeDistribution
from training.policy import TokenTerm


def _reverse_kl(teacher: WholeDistribution, config: RunConfig, seed: int) -> TokenTerm:
    return ReverseKL(teacher)


def _jsd(teacher: WholeDistribution, config: RunConfig, seed: int) -> TokenTerm:
    return GeneralizedJSD(teacher, config.distill.jsd_beta)


def _sampled_ce(teacher: WholeDistribution, config: RunConfig, seed: int) -> TokenTerm:
    return SampledCrossEntropy(teacher, config.distill.sampled_tokens, seed)


@dataclass(frozen=True)
class Recipe:
    """One row."""

    teacher_answers: bool = False
    """The teacher answers the prompts, not the student."""
    cloning: bool = False
    """Those answers, or the best of a group, are imitated (cross-entropy)."""
    policy_gradient: bool = True
    """L_policy and the KL to the reference take part."""
    quantile_reward: bool = False
    """The policy gradient is of a response's rank in its group, not of its score."""
    divergence: Callable[[WholeDistribution, RunConfig, int], TokenTerm] = _reverse_kl
    """What compares the student with the teacher at each state; the last argument seeds its draws, if it has any."""
    always_divergence: bool = False
    """It is the loss: weight 1 unless loss.single_step_coef says otherwise."""
    interpolate: bool = False
    """The export is moved back towards the start of the run."""

    def weights(self, config: RunConfig, step: int, same_tokenizer: bool) -> LossWeights:
        """The weights of step `step` as this recipe uses them."""
        weights = loss_weights(config, step, same_tokenizer)
        if not self.policy_gradient:
            weights = replace(weights, policy=0.0, kl=0.0)
            if not self.always_divergence:
                weights = replace(weights, single_step=0.0)
        if self.always_divergence and config.loss.single_step_coef is None:
            weights = replace(weights, single_step=1.0)
        if self.cloning and self.teacher_answers:
            weights = replace(weights, bc=config.loss.bc_coef or 1.0)
        elif self.cloning:
            share = config.distill.bond_forward
            weights = replace(weights, bc=share, policy=weights.policy * (1.0 - share), single_step=0.0)
        return weights


RECIPES: dict[str, Recipe] = {
    "rl": Recipe(),
    # Sequence-level knowledge distillation (arXiv 1606.07947): supervised on the teacher's answers.
    "seqkd": Recipe(teacher_answers=True, cloning=True, policy_gradient=False),
    # Gemma 3 (arXiv 2503.19786, section 3), on the teacher's answers.
    "sampled_ce": Recipe(teacher_answers=True, policy_gradient=False, divergence=_sampled_ce, always_divergence=True),
    # On-policy generalised knowledge distillation (arXiv 2306.13649): no gradient through sampling.
    "gkd": Recipe(policy_gradient=False, divergence=_jsd, always_divergence=True),
    # Best-of-N distillation (arXiv 2407.14622): imitate the best, and climb the quantile reward.
    "bond": Recipe(cloning=True, quantile_reward=True),
    # Averaged policies (arXiv 2406.16768): set reference.update: ema as the anchor.
    "warp": Recipe(interpolate=True),
}


def check_recipe(config: RunConfig, same_tokenizer: bool) -> None:
    """Raises ValueError where a recipe needs the teacher's whole distribution and cannot have it."""
    if RECIPES[config.recipe].always_divergence and not same_tokenizer:
        raise ValueError(
            f"recipe = {config.recipe!r}: it compares whole vocabularies, and student and teacher have different "
            "tokenizers; use seqkd, bond, warp or rl"
        )
