"""Parts of the reward besides the teachers: one file a part, and a row in `PARTS`.

A part is a function from the rollout and the settings (`rewards` of the configuration) to a number for each response,
or for each response token. It counts where its setting `NAME_weight` is not 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rewards.base import RewardInput
from rewards.parts.text_rules import format_score, length_score

Part = Callable[[RewardInput, Any], Sequence[float]]


def _similarity(inputs: RewardInput, settings: Any) -> list[float]:
    from rewards.parts.similarity import similarity  # loads its libraries only where it is asked for

    pairs = zip(inputs.texts_B, inputs.answers_B, strict=True)
    return [similarity(text, answers, settings.similarity_metric) for text, answers in pairs]


def _language(inputs: RewardInput, settings: Any) -> list[float]:
    from rewards.parts.dictionary import dictionary
    from rewards.parts.language import language_score

    accepts = None if settings.language_dictionary is None else dictionary(settings.language_dictionary)
    return [language_score(text, accepts) for text in inputs.texts_B]


def _format(inputs: RewardInput, settings: Any) -> list[float]:
    ended = zip(inputs.texts_B, inputs.finished_B.tolist(), strict=True)
    return [format_score(text, finished, settings.format_pattern) for text, finished in ended]


def _length(inputs: RewardInput, settings: Any) -> list[float]:
    return [length_score(text, settings.length_min_words, settings.length_max_words) for text in inputs.texts_B]


PARTS: dict[str, Part] = {
    "similarity": _similarity,
    "language": _language,
    "format": _format,
    "length": _length,
}


def part_weights(settings: Any) -> dict[str, float]:
    """Weight of each part that counts; `settings`: `rewards` of the configuration."""
    names = [*PARTS, "judge", "bilingual"] + ([] if settings.custom is None else ["custom"])
    weights = {name: float(getattr(settings, f"{name}_weight")) for name in names}
    return {name: weight for name, weight in weights.items() if weight != 0}
