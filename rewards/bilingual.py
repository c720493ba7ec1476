"""Does the answer make sense in the language that the teacher knows better? Scores of its translation, pure."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def translated_scores(logprobs_S: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """float32 [B] the teacher's mean log-probability of a token of each translated answer, nats, at most 0.

    `logprobs_S`: float32 [S] log p_T(token | English prompt, tokens before it) of all translations end to end, each
    with its end symbol; `lengths`: tokens of each. The mean, so that a long translation is not worse for its length.
    """
    return (
        torch.stack([part.mean() for part in logprobs_S.split(list(lengths))]) if lengths else logprobs_S.new_zeros(0)
    )
