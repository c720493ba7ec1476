"""The demo's open questions: tell of a country in a named part of the world. Thousands of answers are right.

An answer names a country of that part and says two or three true things about it, in any order and in one of two ways
each (configs/demo/frames.yaml). So whether an answer is right can be checked by rule: `right_answers` is a regular
expression for all of them. A question is a place and what is asked for; held-out questions are combinations that no
other split has.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from training.data.demo.world import load_frames, profiles

HELDOUT_PHRASINGS = 0.25
"""Share of the combinations of the two sentences that only held-out questions have."""
PLACES = ("continent", "region")
TOLD = ("capital", "currency", "language")
"""What is told of a country, besides the place that was not asked for."""


@dataclass(frozen=True)
class Phrasing:
    """One way to ask: `kind` of place, the frame that names it, and the sentence behind it."""

    kind: str
    place: str
    asked: str

    def question(self, place: str) -> str:
        """The question for a place."""
        return f"{self.place.format(s=place)} {self.asked}"


def phrasings(seed: int, heldout: bool) -> list[Phrasing]:
    """The combinations of the held-out questions, or of all others."""
    frames = load_frames()["tell"]
    chosen = []
    for kind in PLACES:
        every = [
            Phrasing(kind, place["text"], asked)
            for place, asked in itertools.product(frames["places"][kind], frames["asked"])
        ]
        shuffled = random.Random(f"{seed}-tell-{kind}").sample(every, len(every))
        cut = round(len(every) * HELDOUT_PHRASINGS)
        chosen += shuffled[:cut] if heldout else shuffled[cut:]
    return chosen


def countries(kind: str, place: str) -> list[Mapping[str, str]]:
    """Profiles of the countries there."""
    return [profile for profile in profiles()["fact"] if profile.get(kind) == place]


@lru_cache(maxsize=1)
def places() -> list[tuple[str, str]]:
    """(kind, name) of every place with at least two countries of which two things can be told."""
    named = {(kind, profile[kind]) for kind in PLACES for profile in profiles()["fact"] if kind in profile}
    return sorted(
        (kind, place) for kind, place in named if sum(len(_told(p, kind)) >= 2 for p in countries(kind, place)) >= 2
    )


def questions(seed: int, heldout: bool) -> Iterator[tuple[str, str, str]]:
    """(kind, place, question), every place in every phrasing of that split."""
    for phrasing in phrasings(seed, heldout):
        for kind, place in places():
            if kind == phrasing.kind:
                yield kind, place, phrasing.question(place)


def draw_answer(kind: str, place: str, rng: random.Random) -> str:
    """A right answer, each country and each order as likely as the others."""
    country = rng.choice([one for one in countries(kind, place) if len(_told(one, kind)) >= 2])
    told = _told(country, kind)
    keys = rng.sample(told, min(len(told), rng.choice((2, 3))))
    frames = load_frames()["tell"]
    first = rng.choice(frames["countries"])["text"].format(s=country["country"])
    return " ".join([first, *(rng.choice(frames["statements"][key])["text"].format(s=country[key]) for key in keys)])


def right_answers(kind: str, place: str) -> str:
    """A regular expression that matches the right answers, and nothing else, whole."""
    frames = load_frames()["tell"]

    def one_of(texts: Sequence[str]) -> str:
        return f"(?:{'|'.join(texts)})"

    def said(frame: Mapping[str, str], name: str) -> str:
        return re.escape(frame["text"].format(s=name))

    options = []
    for country in countries(kind, place):
        told = _told(country, kind)
        if len(told) >= 2:
            first = one_of([said(frame, country["country"]) for frame in frames["countries"]])
            each = [one_of([said(frame, country[key]) for frame in frames["statements"][key]]) for key in told]
            twice = "".join(f"(?!.*{one}.*{one})" for one in each)
            options.append(f"{first}{twice}(?: {one_of(each)})+")
    return one_of(options)


def _told(country: Mapping[str, str], asked: str) -> list[str]:
    """Keys of what can be told of a country, where the place of kind `asked` is known from the question."""
    other = "region" if asked == "continent" else "continent"
    return [key for key in (*TOLD, other) if key in country]
