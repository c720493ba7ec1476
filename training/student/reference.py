"""The reference of the KL term: the start of the run, or what has become of it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes

from configs.schema import RunConfig
from training import distributed
from training.experience import Rollout
from training.losses import WholeDistribution
from training.student.actor import Actor
from training.student.adapters import plain_parameters
from training.student.loading import load_policy
from training.student.passes import Passes, each_token
from training.student.policy import Way

EMA_DECAY = 0.99
"""Share of itself that the moving average keeps at each step (WARP, arXiv 2406.16768)."""


class Reference:
    """What the KL term is measured against. Methods are called by all ranks together."""

    def logprobs(self, rollout: Rollout) -> torch.Tensor:
        """log pi_ref of the response tokens at the sampling temperature, float32 [S]."""
        raise NotImplementedError

    def states(self, rollout: Rollout) -> WholeDistribution:
        """Its whole distribution at each response token in batch order."""
        raise NotImplementedError

    def follow(self, actor: Actor, step: int) -> None:
        """Take what the actor has learnt by the end of step `step` (from 0), if it is that kind of reference."""

    def save(self, directory: Path) -> list[tuple[Path, bytes]]:
        """Files with its weights, where they cannot be made again."""
        return []

    def load(self, directory: Path) -> None:
        """What `save` wrote."""


def make_reference(config: RunConfig, actor: Actor) -> Reference:
    """The adapter switched off where that is the reference (it starts at zero: training/student/adapters.py), else a
    copy."""
    fixed = config.reference.update == "fixed"
    if config.student.adapter.rank > 0 and fixed and config.loss.kl_estimator != "full":
        return AdapterOff(actor)
    return FrozenCopy(config, actor.engine.device, way=actor.policy.way)


class AdapterOff(Reference):
    """The student without its adapter: it stays the start of the run. The full KL takes a copy."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor

    def logprobs(self, rollout: Rollout) -> torch.Tensor:
        return self._actor.logprobs(rollout, start_of_run=True)


class FrozenCopy(Reference):
    """A copy of the student, held whole by each rank."""

    FILE = "model.safetensors"

    def __init__(
        self, config: RunConfig, device: torch.device, *, update: str | None = None, way: Way | None = None
    ) -> None:
        """`update`: in place of the configuration's. `way`: how the actor's model is run, and so this one."""
        self._config = config
        self._update = update or config.reference.update
        self._passes = Passes(config.actor.micro_batch_tokens, device)
        self._policy = load_policy(config.student.path, config.student.dtype).to(device).eval().requires_grad_(False)
        if way is not None:
            self._policy.run(way)
        # A moving average in bfloat16 would stand still: an update of 1 % is lost in its 8 bits.
        self._average: dict[str, torch.Tensor] = {}
        if self._update == "ema" and config.student.dtype != "float32":
            self._average = {n: p.float().cpu() for n, p in self._policy.model.named_parameters()}

    def logprobs(self, rollout: Rollout) -> torch.Tensor:
        temperature = self._config.sampling.temperature
        return each_token(
            self._passes, rollout.groups(), lambda row: self._policy(row, temperature=temperature).logprobs_S
        )

    def states(self, rollout: Rollout) -> WholeDistribution:
        hidden_SD = each_token(self._passes, rollout.groups(), self._policy.response_states)
        return WholeDistribution(hidden_SD, torch.no_grad()(self._policy.logits))

    @torch.no_grad()
    def follow(self, actor: Actor, step: int) -> None:
        settings = self._config.reference
        if self._update == "fixed" or (self._update == "every" and (step + 1) % settings.every != 0):
            return
        keep = EMA_DECAY if self._update == "ema" else 0.0
        mine = dict(self._policy.model.named_parameters())
        for name, value in plain_parameters(actor.policy.model, actor.engine.gathered):
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
        if self._update == "fixed":
            return
        saved = load_file(directory / self.FILE)
        for name, parameter in self._policy.model.named_parameters():
            parameter.copy_(saved[name])
            if name in self._average:
                self._average[name].copy_(saved[name])
