"""What the embedded demo knows: names from CLDR (babel, locale `fo`), facts from CLDR and countryinfo.

No sentence is made here; training/data/demo/sentences.py does that, from the patterns in configs/demo/frames.yaml.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from babel import Locale
from babel.languages import get_official_languages
from babel.numbers import get_territory_currencies
from countryinfo import CountryInfo

FRAMES_FILE = Path(__file__).resolve().parents[3] / "configs" / "demo" / "frames.yaml"

FAROESE = Locale("fo")
ENGLISH = Locale("en")
TENDER_DATE = date(2025, 1, 1)
"""Legal tenders as of this day; babel's default is today, which would let the data change by itself."""

# UN M49 codes, under which CLDR names the regions. Left out: South-eastern Asia, because CLDR's Faroese for 035 says
# south-west, and regions whose Faroese name is a description (021, 057, 202).
CONTINENTS = {"Africa": "002", "Americas": "019", "Asia": "142", "Europe": "150", "Oceania": "009"}
REGIONS = {
    "Northern Europe": "154",
    "Western Europe": "155",
    "Eastern Europe": "151",
    "Southern Europe": "039",
    "Northern Africa": "015",
    "Western Africa": "011",
    "Middle Africa": "017",
    "Eastern Africa": "014",
    "South America": "005",
    "Central America": "013",
    "Caribbean": "029",
    "Western Asia": "145",
    "Central Asia": "143",
    "Southern Asia": "034",
    "Eastern Asia": "030",
    "Australia and New Zealand": "053",
    "Melanesia": "054",
    "Polynesia": "061",
}
ODD_NAME = re.compile(r"[(),&/]|\bSAR\b|\bnew\b|\bCity\b|rupis$|rials$")
"""Names that are no plain nominative singular or plural name: comments, lists, English remains, plurals of coins."""

KIND_SUBJECTS = 64
"""How many words are asked what they are."""


@dataclass(frozen=True)
class Fact:
    """One closed-book fact: `subject` and its right `answers`, the preferred one first."""

    relation: str
    subject: str
    answers: tuple[str, ...]


@lru_cache(maxsize=1)
def load_frames() -> dict[str, Any]:
    """configs/demo/frames.yaml as nested dicts and lists."""
    frames = yaml.safe_load(FRAMES_FILE.read_text(encoding="utf-8"))
    assert isinstance(frames, dict)
    return frames


def plain(name: str | None) -> str | None:
    """The name itself if it can stand in a sentence, else None."""
    return None if name is None or ODD_NAME.search(name) else name


@lru_cache(maxsize=1)
def faroese_cities() -> dict[str, str]:
    """English to Faroese names of CLDR's exemplar cities, where the two differ.

    A zone without an English exemplar city is named by the last part of its id. Zones that are named after a country
    (Atlantic/Faeroe) do no harm: a capital is looked up by its English name, and no capital is called Faroe.
    """
    cities = {}
    for zone, names in FAROESE.time_zones.items():
        english = ENGLISH.time_zones.get(zone, {}).get("city") or zone.split("/")[-1].replace("_", " ")
        if "city" in names and zone.split("/")[0] != "Etc":
            cities[english] = names["city"]
    return cities


def capital_of(code: str) -> str | None:
    """Faroese name of the capital of country `code`, or None if there is no plain one."""
    fixes = load_frames()["capital_fixes"]
    if code in fixes:
        return str(fixes[code])
    english = str(CountryInfo(code).capital())
    return plain(faroese_cities().get(english, english))


def only(names: Iterable[str | None]) -> str | None:
    """The single element, if there is exactly one and it is a plain name."""
    found = list(names)
    return plain(found[0]) if len(found) == 1 else None


def country_profile(code: str) -> dict[str, str]:
    """What is known of country `code`: `country`, `continent`, and where clear capital, currency, language, region.

    A country with several official languages or legal tenders gets none of them, so each question has one answer.
    """
    info: dict[str, Any] = dict(CountryInfo(code).info())
    tenders = get_territory_currencies(code, start_date=TENDER_DATE, end_date=TENDER_DATE)
    languages = get_official_languages(code, de_facto=True)
    region = REGIONS.get(info.get("intermediateregion") or info["subregion"])
    known = {
        "country": plain(FAROESE.territories[code]),
        "capital": capital_of(code),
        "currency": only(FAROESE.currencies.get(tender) for tender in tenders),
        "language": only(FAROESE.languages.get(language) for language in languages),
        "continent": FAROESE.territories[CONTINENTS[info["region"]]],
        "region": region and FAROESE.territories[region],
    }
    return {key: name for key, name in known.items() if name}


def days() -> list[str]:
    """Weekdays, Monday first."""
    return [FAROESE.days["stand-alone"]["wide"][index] for index in range(7)]


def months() -> list[str]:
    """Months, January first."""
    return [FAROESE.months["stand-alone"]["wide"][index] for index in range(1, 13)]


@lru_cache(maxsize=1)
def profiles() -> dict[str, list[dict[str, str]]]:
    """Country profiles by group: `fact`, `context`."""
    return {group: [country_profile(code) for code in codes] for group, codes in load_frames()["countries"].items()}


@lru_cache(maxsize=1)
def word_lists() -> dict[str, list[str]]:
    """Every list that text frames and the relation `kind` draw from, sorted where it is a set."""
    words = load_frames()["words"]
    every = [profile for group in profiles().values() for profile in group]

    def collect(*keys: str) -> list[str]:
        return sorted({profile[key] for profile in every for key in keys if key in profile})

    named = words["names"].items()
    people = [name for kind, names in named for name in names if kind in ("men", "women")]
    sites = [name for kind, names in named for name in names if kind in ("villages", "islands", "mountains")]
    return {
        "countries": collect("country"),
        "capitals": collect("capital"),
        "languages": collect("language"),
        "currencies": collect("currency"),
        "places": collect("region", "continent"),
        "days": days(),
        "months": months(),
        "names": people,
        "sites": sites,
    }


def all_facts() -> list[Fact]:
    """Every closed-book fact of the demo."""
    facts = []
    for profile in profiles()["fact"]:
        country = profile["country"]
        facts += [Fact(key, country, (profile[key],)) for key in profile if key != "country"]
        if "capital" in profile:
            facts.append(Fact("country", profile["capital"], (country,)))
    for name, ring in (("day", days()), ("month", months())):
        for index, subject in enumerate(ring):
            facts.append(Fact(f"next_{name}", subject, (ring[(index + 1) % len(ring)],)))
            facts.append(Fact(f"previous_{name}", subject, (ring[index - 1],)))
    labelled = [(word, kind) for name, kind in load_frames()["kinds"].items() for word in word_lists()[name]]
    # A word that is two things (Monako, Panama, Asia) has no single answer.
    counts = Counter(word for word, _ in labelled)
    single = [Fact("kind", word, (kind,)) for word, kind in labelled if counts[word] == 1]
    return facts + random.Random("kind").sample(single, KIND_SUBJECTS)
