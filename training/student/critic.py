"""The critic of PPO: a value for the state before each response token. A second DeepSpeed engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from configs.schema import RunConfig
from inference.attention.packing import PackedRow
from training import distributed
from training.experience import Experience, Rollout
from training.losses import value_loss
from training.run.safe_points import nothing
from training.student.deepspeed_engine import Engine, Optimisation
from training.student.loading import load_policy
from training.student.passes import each_token, rows_in_step
from training.student.policy import Way, backbone, response_states


class ValueModel(nn.Module):
    """A language model's backbone with one number a token in place of its output layer."""

    def __init__(self, backbone: nn.Module, hidden_size: int, *, grouped: bool = True) -> None:
        super().__init__()
        self._grouped = grouped
        self.backbone = backbone
        # Zero start: the first advantages are the rewards themselves, not noise. In the backbone's type, which is not
        # cast as a whole: its rotary frequencies are float32 in bfloat16 models too.
        self.head = nn.Linear(hidden_size, 1, dtype=next(backbone.parameters()).dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def config(self) -> Any:
        """The Hugging Face configuration; DeepSpeed looks for it here."""
        return self.backbone.config

    def forward(self, row: PackedRow) -> torch.Tensor:
        """Values float32 [S]: V(prompt, tokens before t) for each response token t of the row."""
        return self.head(response_states(self.backbone, row, grouped=self._grouped)).float()[:, 0]


class Critic:
    """Values of a rollout, and their training."""

    def __init__(self, config: RunConfig, *, total_steps: int, grouped: bool = True) -> None:
        """`grouped`: whether the actor's model shares prompts; where it does not, this one does not either."""
        self._config, student = config, config.student
        policy = load_policy(student.path, student.dtype, gradient_checkpointing=student.gradient_checkpointing)
        if not grouped:
            policy.run(Way.PLAIN)
        hidden_size = policy.config.get_text_config().hidden_size
        self.engine = Engine(
            ValueModel(backbone(policy.model), hidden_size, grouped=policy.grouped),
            config.actor,
            Optimisation(config.critic.learning_rate, total_steps, config.critic.zero_stage, student.dtype),
        )

    def values(self, rollout: Rollout) -> torch.Tensor:
        """Values before each response token, float32 [S]. Collective."""
        return each_token(self.engine.passes, rollout.groups(), self.engine.module)

    def update(
        self, experiences: Sequence[Experience], step: int, *, between: Callable[[], None] = nothing
    ) -> dict[str, float]:
        """One optimizer step a mini-batch on the clipped value loss; returns metrics over all ranks. Collective.

        `between`: see `Actor.update`.
        """
        loss_sum, norm = 0.0, 0.0
        for i, experience in enumerate(experiences):
            tokens = float(distributed.sum_over_ranks(experience.rollout.lengths_B.sum()))
            if tokens > 0:
                number, asked = step * len(experiences) + i, between if i == 0 else nothing
                losses: list[torch.Tensor] = []
                rows = rows_in_step(experience.rollout.groups(), self.engine.passes.tokens)
                jobs = [partial(self._loss, experience, row, 1.0 / tokens, losses) for row in rows]
                norm, _, _ = self.engine.update(jobs, number, between=asked)
                loss_sum += sum(float(x) for x in losses)
        total = distributed.sum_metrics({"loss/value": loss_sum / max(len(experiences), 1)})
        return {**total, "critic/grad_norm": norm}

    def _loss(
        self, experience: Experience, row: PackedRow, weight: float, losses: list[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The value loss of one packed row, each token weighted alike; also appended to `losses`, for the log."""
        values_S, targets_S = experience.scored.values_S, experience.value_targets_S
        assert values_S is not None
        assert targets_S is not None
        new_S, old_S, wanted_S = self.engine(row), self.engine.of_row(row, values_S), self.engine.of_row(row, targets_S)
        weights_S = torch.full_like(new_S, weight)
        loss = value_loss(new_S, old_S, wanted_S, weights_S, clip=self._config.ppo.value_clip)
        losses.append(loss.detach())
        return {"value": loss}
