"""What rounding does to a model: the measure of how far two ways of computing the same may be apart."""

from __future__ import annotations

import torch


def rounded_down(values: torch.Tensor) -> torch.Tensor:
    """Half of the numbers, always the same, down to the next one of their type."""
    down = torch.rand(values.shape, generator=torch.Generator().manual_seed(0)).to(values.device) < 0.5
    return torch.where(down, values * (1.0 - torch.finfo(values.dtype).eps / 2), values)
