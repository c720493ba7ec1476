"""The reference of the KL term: the start of the run, or what has become of it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes

from configs.schema import RunConfig
from inference.packing import pack, scatter_responses
from training import distributed
from training.actor import Actor
from training.distillation import WholeDistribution
from training.experience import Rollout
from training.memory import TokenBudget, agreed
from training.policy import load_policy


class Reference(Protocol):
    """What the loop asks of it. Methods are called by all ranks together."""

    def logprobs(self, rollout: Rollout) -> torch.Tensor:
        """log pi_ref of the response tokens at the sampling temperature, float32 [B, R]; 0 on padding."""
        ...

    def states(self, rollout: Rollout) -> WholeDistribution:
        """Its whole distribution at each response token in batch order."""
        ...

    def follow(self, actor: Actor, step: int) -> None:
        """Take what the actor has learnt by the end of step `step` (from 0), if it is that kind of reference."""
        ...

    def save(self, directory: Path) -> list[tuple[Path, bytes]]:
        """Files with its weights, where they cannot be made again."""
        ...

    def load(self, directory: Path) -> None:
        """What `save` wrote."""
        ...


def make_reference(config: RunConfig, actor: Actor) -> Reference:
    """The adapter switched off where that is the reference (it starts at zero: training/adapters.py), else a copy."""
    fixed = config.reference.update == "fixed"
    if config.student.adapter.rank > 0 and fixed and config.loss.kl_estimator != "full":
        return AdapterOff(actor)
    return FrozenCopy(config, config.student.path, actor.engine.device)


class AdapterOff:
    """The student without its adapter."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor

    def logprobs(self, rollout: Rollout) -> torch.Tensor:
        """See `Reference.logprobs`."""
        return self._actor.logprobs(rollout, start_of_run=True)

    def states(self, rollout: Rollout) -> WholeDistribution:
        """Not offered: `make_reference` takes a copy for the full KL."""
        raise NotImplementedError("loss.kl_estimator full needs a copy of the student")

    def follow(self, actor: Actor, step: int) -> None:
        """It stays the start of the run."""

    def save(self, directory: Path) -> list[tuple[Path, bytes]]:
        """Nothing to save."""
        return []

    def load(self, directory: Path) -> None:
        """Nothing was saved."""


class FrozenCopy:
    """A copy of the student, held whole by each rank."""

    FILE = "model.safetensors"

    def __init__(self, config: RunConfig, path: str | Path, device: torch.device, *, update: str | None = None) -> None:
        self._config = config
        self._update = update or config.reference.update
        self._device = device
        self._budget = TokenBudget(config.actor.micro_batch_tokens)
        self._policy = load_policy(path, config.student.dtype).to(device).eval().requires_grad_(False)
        # A moving average in bfloat16 would stand still: an update of 1 % is lost in its 8 bits.
        self._average: dict[str, torch.Tensor] = {}
        if self._update == "ema" and config.student.dtype != "float32":
            self._average = {n: p.float().cpu() for n, p in self._policy.model.named_parameters()}

    @torch.no_grad()
    def logprobs(self, rollout: Rollout) -> torch.Tensor:
        """See `Reference.logprobs`."""
        temperature = self._config.sampling.temperature

        def passes(tokens: int) -> torch.Tensor:
            rows = pack(rollout.groups(), tokens)
            values = agreed(
                lambda: [self._policy(row.to(self._device), temperature=temperature).logprobs_S.cpu() for row in rows],
                exchanging=False,
            )
            return scatter_responses(rows, values, *rollout.behavior_logprobs_BR.shape)

        return self._budget.spend(passes)

    @torch.no_grad()
    def states(self, rollout: Rollout) -> WholeDistribution:
        """See `Reference.states`."""
        shape = rollout.behavior_logprobs_BR.shape
        size = self._policy.config.get_text_config().hidden_size
        hidden_BRD = torch.zeros(*shape, size, dtype=self._policy.model.dtype)

        def passes(tokens: int) -> None:
            for row in pack(rollout.groups(), tokens):
                hidden_BRD[row.response_S, row.offset_S] = self._policy.response_states(row.to(self._device)).cpu()

        self._budget.spend(lambda tokens: agreed(lambda: passes(tokens), exchanging=False))
        output = self._policy.model.get_output_embeddings().weight.detach()
        return WholeDistribution(hidden_BRD[rollout.mask_BR], output)

    @torch.no_grad()
    def follow(self, actor: Actor, step: int) -> None:
        """See `Reference.follow`."""
        settings = self._config.reference
        if self._update == "fixed" or (self._update == "every" and (step + 1) % settings.every != 0):
            return
        keep = settings.decay if self._update == "ema" else 0.0
        mine = dict(self._policy.model.named_parameters())
        for name, value in actor.plain_parameters():
            if name in self._average:
                average = self._average[name]
                average.lerp_(value.float().cpu(), 1.0 - keep)
                mine[name].copy_(average)
            else:
                mine[name].lerp_(value.to(mine[name]), 1.0 - keep)

    def save(self, directory: Path) -> list[tuple[Path, bytes]]:
        """See `Reference.save`; rank 0 writes."""
        if self._update == "fixed" or not distributed.is_main():
            return []
        named = self._average or dict(self._policy.model.named_parameters())
        tensors = {name: value.detach().cpu().contiguous() for name, value in named.items()}
        return [(directory / self.FILE, safetensors_bytes(tensors))]

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        """See `Reference.load`."""
        if self._update == "fixed":
            return
        saved = load_file(directory / self.FILE)
        for name, parameter in self._policy.model.named_parameters():
            parameter.copy_(saved[name])
            if name in self._average:
                self._average[name].copy_(saved[name])
