"""The extra parts of the reward, as configured: similarity, language, format, length, judge, exact match."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch

from configs.checks import require
from configs.learning import RewardConfig
from configs.schema import RunConfig
from rewards.answers import exact_match
from rewards.base import RewardInput
from rewards.combine import Part
from rewards.text_rules import format_score, length_score
from training.experience import Rollout

HUNSPELL_FOLDERS = (Path("/usr/share/hunspell"), Path("/usr/share/myspell/dicts"))


def extra_parts(inputs: RewardInput, rollout: Rollout, config: RunConfig) -> list[Part]:
    """Every part whose weight is not 0, but `bilingual` (training/bilingual.py). The judge asks its endpoint (cached in
    config.cache_dir); the rest is pure."""
    rewards = config.rewards
    makers: dict[str, Callable[[], list[float]]] = {
        "exact_match": lambda: [
            exact_match(text, answers) if answers else 0.0
            for text, answers in zip(inputs.texts, inputs.answers, strict=True)
        ],
        "similarity": lambda: _similarities(inputs, rewards.similarity_metric),
        "language": lambda: _languages(inputs.texts, rewards),
        "format": lambda: [
            format_score(text, bool(finished), rewards.format_pattern)
            for text, finished in zip(inputs.texts, inputs.finished_B.tolist(), strict=True)
        ],
        "length": lambda: [
            length_score(text, rewards.length_min_words, rewards.length_max_words) for text in inputs.texts
        ],
        "judge": lambda: _judged(inputs.texts, rollout, config),
    }
    weights = {name: float(getattr(rewards, f"{name}_weight")) for name in makers}
    return [Part(name, weights[name], torch.tensor(make())) for name, make in makers.items() if weights[name] != 0]


def _similarities(inputs: RewardInput, metric: str) -> list[float]:
    from rewards.similarity import similarity

    return [similarity(text, answers, metric) for text, answers in zip(inputs.texts, inputs.answers, strict=True)]


def _languages(texts: Sequence[str], rewards: RewardConfig) -> list[float]:
    from rewards.language import language_score

    accepts = None if rewards.language_dictionary is None else dictionary(rewards.language_dictionary)
    return [language_score(text, accepts) for text in texts]


def _judged(texts: Sequence[str], rollout: Rollout, config: RunConfig) -> list[float]:
    """The judge's marks; a response whose mark could not be had gets the mean of the others in its group."""
    from training.api_teacher import judge_of

    questions = [prompt.text for prompt in rollout.prompts for _ in range(rollout.group_size)]
    marks = judge_of(config.rewards.judge, config.cache_dir).marks(list(zip(questions, texts, strict=True)))
    out: list[float] = []
    for first in range(0, len(marks), rollout.group_size):
        group = marks[first : first + rollout.group_size]
        known = [mark for mark in group if mark is not None]
        mean = sum(known) / len(known) if known else 0.5
        out += [mean if mark is None else mark for mark in group]
    return out


def check_extra_rewards(config: RunConfig) -> None:
    """What the parts need from outside, before any model is loaded. Raises ValueError with the mend."""
    if config.rewards.language_weight != 0 and config.rewards.language_dictionary is not None:
        dictionary(config.rewards.language_dictionary)
    if config.rewards.bilingual_weight != 0:
        path = Path(str(config.rewards.bilingual.path))
        require((path / "config.json").is_file(), "rewards.bilingual.path", str(path), "no model directory")
    if config.rewards.judge_weight != 0:
        from training.api_teacher import check_access

        check_access()


def dictionary_path(name: str) -> Path:
    """Where the Hunspell dictionary is: `auto` looks for an installed Faroese one, else a path without .dic and .aff.

    Raises ValueError with the mend where it is not there.
    """
    places = [folder / code for folder in HUNSPELL_FOLDERS for code in ("fo_FO", "fo")]
    for place in places if name == "auto" else [Path(name)]:
        if all(place.with_name(f"{place.name}.{end}").is_file() for end in ("dic", "aff")):
            return place
    raise ValueError(
        f"rewards.language_dictionary = {name!r}: no such Hunspell dictionary; give a path without .dic and .aff, "
        "install one (Debian: myspell-fo), or leave it out"
    )


@lru_cache(maxsize=1)
def dictionary(name: str) -> Callable[[str], bool]:
    """A function that accepts the words of a Hunspell dictionary, read through spylls (some seconds, once)."""
    place = dictionary_path(name)
    try:
        from spylls.hunspell import Dictionary
    except ImportError:
        raise ValueError("rewards.language_dictionary needs the package spylls: pip install spylls") from None
    lookup = Dictionary.from_files(str(place)).lookup

    @lru_cache(maxsize=1 << 16)
    def accepts(word: str) -> bool:
        return bool(lookup(word) or lookup(word.capitalize()))  # the first word of an answer may be a name

    return accepts
