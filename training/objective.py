"""The loss L = L_policy + beta L_KL + lambda_PT L_PT + lambda_BC L_BC + lambda_1 L_single: its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from configs.schema import RunConfig
from inference.attention.packing import Group
from rewards import REWARDS
from training.experience import Experience
from training.losses import schedule_factor

TERMS = ("policy", "kl", "pt", "bc", "single_step")
"""Terms of the loss."""


@dataclass(frozen=True)
class LossWeights:
    """Weight of each term in one step. A term of weight 0 is not computed."""

    policy: float = 0.0
    """L_policy."""
    kl: float = 0.0
    """beta, KL to the reference."""
    pt: float = 0.0
    """lambda_PT, raw text."""
    bc: float = 0.0
    """lambda_BC, answers to imitate."""
    single_step: float = 0.0
    """lambda_1, divergence to the teacher's distribution at each visited state."""


SUPERVISED = LossWeights(bc=1.0)
"""Stage 1, and supervised phases."""


@dataclass(frozen=True)
class UpdateInput:
    """One mini-batch of this rank for one optimizer step."""

    experience: Experience | None
    """Sampled responses with their advantages; None: supervised text only (stage 1)."""
    text: Sequence[Group]
    """L_PT: raw text, the first token as the prompt and the rest as its response."""
    cloning: Sequence[Group]
    """L_BC: prompts with the answers to imitate."""
    weights: LossWeights
    """Weight of each term in this step."""


def counts_of(batch: UpdateInput) -> dict[str, float]:
    """This rank's denominators."""
    tokens = responses = 0.0
    if batch.experience is not None:
        lengths = batch.experience.rollout.lengths_B
        tokens, responses = float(lengths.sum()), float(len(lengths))
    return {
        "tokens": tokens,
        "responses": responses,
        "pt": float(sum(len(r) for g in batch.text for r in g.responses)),
        "bc": float(sum(len(r) for g in batch.cloning for r in g.responses)),
    }


def single_step_coef(config: RunConfig, same_tokenizer: bool) -> float:
    """lambda_1 with its default resolved."""
    if config.loss.single_step_coef is not None:
        return config.loss.single_step_coef
    return 1.0 if REWARDS[config.reward].single_step and same_tokenizer else 0.0


def pt_coef(config: RunConfig) -> float:
    """lambda_PT with its default resolved: MiniLLM trains on raw text, where there is some, unless told otherwise."""
    if config.loss.pt_coef is not None:
        return config.loss.pt_coef
    return REWARDS[config.reward].raw_text if config.data.text is not None else 0.0


def loss_weights(config: RunConfig, step: int, same_tokenizer: bool) -> LossWeights:
    """The weights in force at step `step` (from 0): coefficient times its schedule's factor."""
    loss = config.loss
    weights = {term: getattr(loss, f"{term}_coef") for term in TERMS}
    weights |= {"pt": pt_coef(config), "single_step": single_step_coef(config, same_tokenizer)}
    for term in TERMS:
        schedule = getattr(loss, f"{term}_schedule")
        total = schedule.steps or config.steps
        weights[term] *= schedule_factor(step, kind=schedule.kind, final=schedule.final, total=total)
    return LossWeights(**weights)
