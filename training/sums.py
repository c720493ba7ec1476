"""Sums over the packed rows of an optimizer step, for the log."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Sums:
    """Local sums over the rows of one optimizer step, for the log; on the device until `numbers` waits for it."""

    values: dict[str, torch.Tensor]

    def add(self, name: str, value: torch.Tensor) -> None:
        """Add a scalar to the sum called `name`."""
        value = value.detach().double()
        self.values[name] = self.values[name] + value if name in self.values else value

    def largest(self, name: str, value: torch.Tensor) -> None:
        """Keep the largest of a name's scalars."""
        value = value.detach().double()
        self.values[name] = torch.maximum(self.values[name], value) if name in self.values else value

    def numbers(self) -> dict[str, float]:
        """All of them, in one transfer."""
        stacked = torch.stack([*self.values.values()]).tolist() if self.values else []
        return dict(zip(self.values, stacked, strict=True))
