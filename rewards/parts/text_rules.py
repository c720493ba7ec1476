"""Rewards for how a response is written: its form and its length. Pure functions of strings, 0 to 1."""

from __future__ import annotations

import re

from rewards.answers import composed


def format_score(response: str, finished: bool, pattern: str) -> float:
    """1.0 where the response ended by itself and the whole of it matches `pattern` (a regular expression), else 0.0."""
    return float(finished and re.fullmatch(composed(pattern), composed(response), flags=re.DOTALL) is not None)


def length_score(response: str, least: int, most: int) -> float:
    """1.0 from `least` to `most` words; below, the share of `least` that is there; above, down to 0 at twice `most`.

    No step anywhere: a response that comes one word nearer is a little better, so that there is something to learn.
    """
    words = len(response.split())
    if words < least:
        return words / least
    return max(0.0, 1.0 - max(0, words - most) / most)
