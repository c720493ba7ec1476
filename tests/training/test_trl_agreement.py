"""Our loss against TRL's own: GRPOTrainer._compute_loss of TRL 1.16.0, driven with fixed log-probabilities.

TRL is a test-only dependency; without it these tests are skipped (`pip install trl==1.16.0 accelerate==1.15.0`). The
trainer is made without its constructor (no model, no data, no accelerator state): only what the loss reads is set.

Where we read TRL otherwise, and so do not compare:
- `grpo`, `bnpo` and `dr_grpo` average within a micro-batch and then over micro-batches, so with gradient accumulation
  a response's weight depends on how the batch was cut (trap 22); `test_trl_depends_on_the_cut` shows it. One
  micro-batch is the same as ours.
- `old_per_token_logps` may be missing, and then the policy's own are taken for those of sampling (trap 9). Ours are
  always what sampling recorded.
- `scale_rewards="batch"` divides centred rewards by the deviation of the rewards (not centred by group), ours by that
  of the advantages over tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import LossConfig
from rewards.tokens import from_grid, response_of_token
from training.losses import PolicyTokens, kl_loss, policy_loss, token_weights

pytest.importorskip("trl")

LONGEST = 6  # of a completion, sampling.max_new_tokens
LOW, HIGH, BETA = 0.2, 0.28, 0.05


@pytest.fixture(scope="module")
def trainer_class() -> Any:
    from trl.trainer.grpo_trainer import GRPOTrainer

    return GRPOTrainer


class OneProcess:
    """What the loss asks of accelerate, with one process."""

    num_processes = 1
    sync_gradients = True

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def reduce(self, x: torch.Tensor, reduction: str) -> torch.Tensor:
        return x


def their_loss(
    trainer_class: Any, policy_BR: torch.Tensor, case: dict[str, torch.Tensor], loss_type: str, level: str, *,
    beta: float = BETA, accumulation: int = 1, all_tokens: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """TRL's loss of one micro-batch."""
    trainer = object.__new__(trainer_class)
    trainer.model = SimpleNamespace(training=True)
    trainer.accelerator = OneProcess()
    trainer.args = SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=accumulation)
    trainer.loss_type, trainer.importance_sampling_level, trainer.beta = loss_type, level, beta
    trainer.epsilon_low, trainer.epsilon_high = LOW, HIGH
    trainer.top_entropy_quantile, trainer.off_policy_mask_threshold = 1.0, None
    trainer.aux_loss_enabled = trainer._entropy_bonus_enabled = trainer.use_vllm = False
    trainer.max_completion_length, trainer.current_gradient_accumulation_steps = LONGEST, accumulation
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (policy_BR, torch.zeros_like(policy_BR), None)
    mask_BR = (torch.arange(policy_BR.shape[1])[None, :] < case["lengths"][:, None]).long()
    prompt = torch.ones(len(policy_BR), 1, dtype=torch.int64)
    inputs = {
        "prompt_ids": prompt, "prompt_mask": prompt, "completion_ids": mask_BR, "completion_mask": mask_BR,
        "advantages": case["advantages"], "old_per_token_logps": case["behavior"],
        "ref_per_token_logps": case["reference"],
        "num_items_in_batch": mask_BR.sum() if all_tokens is None else torch.tensor(all_tokens),
    }  # fmt: skip
    return trainer._compute_loss(None, inputs)


def our_loss(
    policy_BR: torch.Tensor, case: dict[str, torch.Tensor], aggregation: str, ratio: str, *, beta: float = BETA
) -> torch.Tensor:
    """The product's loss of the same batch."""
    lengths_B = case["lengths"]
    weights_S = token_weights(
        lengths_B,
        aggregation,
        tokens=float(lengths_B.sum()),
        responses=float(len(lengths_B)),
        constant=float(LONGEST),
    )
    policy_S, behavior_S, reference_S = (
        from_grid(values_BR, lengths_B) for values_BR in (policy_BR, case["behavior"], case["reference"])
    )
    advantages_S, response_S = case["advantages"].repeat_interleave(lengths_B), response_of_token(lengths_B)
    tokens = PolicyTokens(policy_S, behavior_S, advantages_S, weights_S, response_S)
    loss, _ = policy_loss(tokens, LossConfig(clip_low=LOW, clip_high=HIGH, ratio=ratio))  # type: ignore[arg-type]
    kl = kl_loss(policy_S, reference_S, weights_S, estimator="k3")
    return loss + beta * kl


def make_case(lengths: list[int], seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Random log-probabilities whose ratios pass both ends of the clip range, with rubbish on the padding."""
    generator = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> torch.Tensor:
        return scale * torch.randn(len(lengths), max(lengths), generator=generator, dtype=torch.float64)

    policy_BR = -noise(1.0).abs()
    case = {
        "behavior": policy_BR + noise(0.3),
        "reference": policy_BR + noise(0.5),
        "advantages": noise(1.0)[:, 0],
        "lengths": torch.tensor(lengths),
    }
    return policy_BR.requires_grad_(), case


def compare(ours: torch.Tensor, theirs: torch.Tensor, policy_BR: torch.Tensor) -> None:
    """Values and gradients to 1e-6."""
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=1e-6)
    (our_gradient,) = torch.autograd.grad(ours, policy_BR)
    (their_gradient,) = torch.autograd.grad(theirs, policy_BR)
    assert float((our_gradient - their_gradient).abs().max()) < 1e-6
    assert float(our_gradient.abs().max()) > 1e-6


NAMES = [("grpo", "sequence"), ("bnpo", "token"), ("dapo", "token"), ("dr_grpo", "constant")]


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("theirs", "ours"), NAMES)
@settings(max_examples=15)
@given(lengths=st.lists(st.integers(1, LONGEST), min_size=1, max_size=6), seed=st.integers(0, 10**6))
def test_loss_types(trainer_class: Any, theirs: str, ours: str, level: str, lengths: list[int], seed: int) -> None:
    """GRPO, BNPO / DAPO and Dr. GRPO aggregation, each with token ratios and with GSPO's, clip and k3 included."""
    policy_BR, case = make_case(lengths, seed)
    compare(
        our_loss(policy_BR, case, ours, level), their_loss(trainer_class, policy_BR, case, theirs, level), policy_BR
    )


def test_k3_alone(trainer_class: Any) -> None:
    policy_BR, case = make_case([3, 6, 1], 5)
    case["advantages"] = torch.zeros(3, dtype=torch.float64)
    theirs = their_loss(trainer_class, policy_BR, case, "bnpo", "token", beta=1.0)
    compare(our_loss(policy_BR, case, "token", "token", beta=1.0), theirs, policy_BR)


def cuts() -> Iterator[tuple[str, str, bool]]:
    """TRL's name, ours, and whether TRL's loss of two micro-batches is that of the whole."""
    yield "dapo", "token", True
    yield "bnpo", "token", False
    yield "grpo", "sequence", False
    yield "dr_grpo", "constant", False


@pytest.mark.parametrize(("theirs", "ours", "same"), cuts())
def test_trl_depends_on_the_cut(trainer_class: Any, theirs: str, ours: str, same: bool) -> None:
    """Trap 22: two micro-batches of 1 and 3 responses. Only `dapo` counts tokens over the whole batch, as we always do.

    (`grpo` and `dr_grpo` go wrong only with micro-batches of unequal size, as a last one may be.)
    """
    policy_BR, case = make_case([1, 6, 5, 4], 9)
    whole = our_loss(policy_BR, case, ours, "token")
    parts = torch.zeros((), dtype=torch.float64)
    for rows in (slice(0, 1), slice(1, 4)):
        part = {name: value[rows] for name, value in case.items()}
        parts = parts + their_loss(
            trainer_class, policy_BR[rows], part, theirs, "token", accumulation=2, all_tokens=16.0
        )
    if same:
        compare(whole, parts, policy_BR)
    else:
        assert abs(float((whole - parts).detach())) > 1e-3
