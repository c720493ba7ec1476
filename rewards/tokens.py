"""Response tokens laid flat: S of them in batch order (response b, then token t), and what that order asks for.

A response's place is in `lengths_B`, which sums to S: there is no padding, and no mask to get wrong. Only a recurrence
over t wants a rectangle; `to_grid` and `from_grid` are the way there and back.
"""

from __future__ import annotations

import torch


def response_of_token(lengths_B: torch.Tensor) -> torch.Tensor:
    """int64 [S] index b of the response that each token belongs to."""
    return torch.repeat_interleave(torch.arange(len(lengths_B), device=lengths_B.device), lengths_B)


def place_in_response(lengths_B: torch.Tensor) -> torch.Tensor:
    """int64 [S] index t of each token in its response."""
    starts_B = lengths_B.cumsum(0) - lengths_B
    return torch.arange(int(lengths_B.sum()), device=lengths_B.device) - starts_B.repeat_interleave(lengths_B)


def sum_by_response(values_S: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
    """[B] sum over each response's tokens; 0 for an empty one."""
    return values_S.new_zeros(len(lengths_B)).index_add(0, response_of_token(lengths_B), values_S)


def place_on_last_token(values_B: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
    """[S] with a response's value on its last token and 0 on the others; that of an empty response is lost."""
    out_S = values_B.new_zeros(int(lengths_B.sum()))
    kept_B = lengths_B > 0
    out_S[lengths_B.cumsum(0)[kept_B] - 1] = values_B[kept_B]
    return out_S


def to_grid(values_S: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
    """[B, R] with R the longest response, 0 behind each response's end."""
    longest = int(lengths_B.max()) if len(lengths_B) else 0
    grid_BR = values_S.new_zeros(len(lengths_B), longest)
    grid_BR[response_of_token(lengths_B), place_in_response(lengths_B)] = values_S
    return grid_BR


def from_grid(grid_BR: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
    """[S] out of [B, R]; what is behind a response's end is left out."""
    return grid_BR[response_of_token(lengths_B), place_in_response(lengths_B)]


def following(values_S: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
    """[S] the value of the next token of the response; 0 for the last one."""
    last_S = place_in_response(lengths_B) == lengths_B.repeat_interleave(lengths_B) - 1
    return torch.where(last_S, 0.0, values_S.roll(-1))


def discounted_sum(values_S: torch.Tensor, lengths_B: torch.Tensor, factor: float) -> torch.Tensor:
    """[S] out[b, t] = sum_{k >= t} factor**(k - t) values[b, k], over the tokens of response b."""
    values_BR = to_grid(values_S, lengths_B)  # 0 behind a response's end, which the recurrence goes over first
    out_BR, running_B = torch.empty_like(values_BR), values_BR.new_zeros(len(lengths_B))
    for t in range(values_BR.shape[1] - 1, -1, -1):
        running_B = values_BR[:, t] + factor * running_B
        out_BR[:, t] = running_B
    return from_grid(out_BR, lengths_B)


def sum_before(values_S: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
    """[S] sum over the tokens of the response in front of each one."""
    values_BR = to_grid(values_S, lengths_B)
    return from_grid(values_BR.cumsum(1) - values_BR, lengths_B)
