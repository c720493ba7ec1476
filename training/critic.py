"""The critic of PPO: a value for the state before each response token. A second DeepSpeed engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from configs.schema import RunConfig
from inference.packing import PackedRow, pack, scatter_responses
from training import distributed
from training.deepspeed_engine import Engine, in_step
from training.experience import Experience, Rollout
from training.losses import token_weights, value_loss
from training.memory import TokenBudget, agreed
from training.policy import load_policy, response_states
from training.safe_points import nothing


class ValueModel(nn.Module):
    """A language model's backbone with one number a token in place of its output layer."""

    def __init__(self, backbone: nn.Module, hidden_size: int, *, grouped: bool = True) -> None:
        super().__init__()
        self._grouped = grouped
        self.backbone = backbone
        # Zero start: the first advantages are the rewards themselves, not noise.
        self.head = nn.Linear(hidden_size, 1)
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

    def __init__(self, config: RunConfig, student_path: Path, *, total_steps: int) -> None:
        self._config = config
        self.budget = TokenBudget(config.actor.micro_batch_tokens)
        policy = load_policy(
            config.critic.path or student_path, config.student.dtype,
            gradient_checkpointing=config.student.gradient_checkpointing,
        )  # fmt: skip
        hidden_size = policy.config.get_text_config().hidden_size
        self.engine = Engine(
            ValueModel(policy.model.base_model, hidden_size, grouped=policy.grouped).to(policy.model.dtype),
            config.actor, peak_learning_rate=config.critic.learning_rate, zero_stage=config.critic.zero_stage,
            dtype=config.student.dtype, hybrid=False, total_steps=total_steps,
        )  # fmt: skip

    @torch.no_grad()
    def values(self, rollout: Rollout) -> torch.Tensor:
        """Values float32 [B, R] before each response token; 0 on padding. All ranks together under ZeRO 3."""

        def passes(tokens: int) -> torch.Tensor:
            rows = pack(rollout.groups(), tokens)
            padded = in_step(rows)
            outputs = agreed(
                lambda: [self.engine.module(row.to(self.engine.device)).cpu() for row, _ in padded],
                exchanging=self.engine.zero_stage == 3,
            )
            return scatter_responses(rows, outputs[: len(rows)], *rollout.behavior_logprobs_BR.shape)

        return self.budget.spend(passes)

    def update(
        self, experiences: Sequence[Experience], step: int, *, between: Callable[[], None] = nothing
    ) -> dict[str, float]:
        """One optimizer step a mini-batch on the clipped value loss; returns metrics over all ranks. Collective.

        `between`: see `Actor.update`.
        """
        loss_sum, norm = 0.0, 0.0
        for i, experience in enumerate(experiences):
            lengths = experience.rollout.lengths_B
            tokens = float(distributed.sum_over_ranks(lengths.sum()))
            if tokens == 0:
                continue
            weights = token_weights(
                lengths, experience.advantages_BR.shape[1], aggregation="token", tokens=tokens, responses=1.0,
                constant=1.0,
            )  # fmt: skip

            def take(
                tokens: int, number: int = i, experience: Experience = experience, weights: torch.Tensor = weights
            ) -> tuple[float, float]:
                losses: list[torch.Tensor] = []
                jobs = [
                    partial(self._loss, experience, row, weights * used, losses)
                    for row, used in in_step(pack(experience.rollout.groups(), tokens))
                ]
                norm, _, _ = self.engine.update(
                    jobs, step * len(experiences) + number, between=between if number == 0 else nothing
                )
                return sum(float(x) for x in losses), norm

            loss, norm = self.budget.spend(take)
            loss_sum += loss
        total = distributed.sum_metrics({"loss/value": loss_sum / max(len(experiences), 1)})
        return {**total, "critic/grad_norm": norm}

    def _loss(
        self, experience: Experience, row: PackedRow, weights_BR: torch.Tensor, losses: list[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The value loss of one packed row; also appended to `losses`, for the log."""
        assert experience.values_BR is not None
        assert experience.returns_BR is not None
        device, at = self.engine.device, (row.response_S, row.offset_S)
        loss = value_loss(
            self.engine.engine(row.to(device)),
            experience.values_BR[at].to(device),
            experience.returns_BR[at].to(device),
            weights_BR[at].to(device),
            clip=self._config.ppo.value_clip,
        )
        losses.append(loss.detach())
        return {"value": loss}
