"""The embedded demo's data: real Faroese from installed packages, no download.

Names of countries, languages, currencies, months and weekdays are CLDR's (babel, locale `fo`); official languages and
legal tenders are CLDR's too; capitals and regions are countryinfo's. Sentences come from configs/demo/frames.yaml.

The split. `warmup` has some facts with answers and a few phrasings. `rl` asks the other facts (and new texts) in more
phrasings. `heldout` asks in phrasings that occur in neither. A held-out closed-book fact is never in the warm-up, and
no text states it, but `rl` asks for it in other words: there the student sees a question without an answer, and what
it cannot get from anyone it cannot learn. Held-out questions about a text have answers that occur nowhere in the
warm-up or the RL prompts. docs/demo.md has the reasons.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from training.demo_world import Fact, all_facts, load_frames, profiles, word_lists

Use = Literal["warmup", "rl", "heldout"]
Kind = Literal["fact", "context"]

HELDOUT_SHARE = 0.27
WARMUP_SHARE = 0.33
"""Shares of each relation's facts that are held out, and that the warm-up tells; RL alone asks the rest."""
RL_FRAMES_PER_FACT = 3
HELDOUT_FRAMES_PER_FACT = 1
CONTEXT_ROWS: Mapping[Use, int] = {"warmup": 90, "rl": 240, "heldout": 110}
TEXT_ROWS = 1500
STORY_SHARE = 0.4
"""Share of the unlabelled text that is little stories."""


@dataclass(frozen=True)
class DemoRow:
    """One question of the demo."""

    id: str
    kind: Kind
    relation: str
    subject: str
    frame: str
    question: str
    answers: tuple[str, ...]
    context: str | None = None

    def stated(self) -> str:
        """Everything that the row says, answers included."""
        return " ".join((self.context or "", self.question, *self.answers))

    def as_json(self) -> dict[str, Any]:
        """The row as it is written: `context` only where there is one."""
        row = {
            "id": self.id,
            "kind": self.kind,
            "relation": self.relation,
            "subject": self.subject,
            "frame": self.frame,
            "question": self.question,
            "answers": list(self.answers),
        }
        return row if self.context is None else {**row, "context": self.context}


@dataclass(frozen=True)
class DemoData:
    """The three splits and the unlabelled text."""

    warmup: list[DemoRow]
    rl: list[DemoRow]
    heldout: list[DemoRow]
    text: list[str]


# --- texts to ask about --------------------------------------------------------------------------------------------


def fill(template: str, **slots: str) -> str:
    """The template with its slots filled; a sentence starts with a capital."""
    filled = template.format(**slots)
    return filled[:1].upper() + filled[1:]


FAMILIES = {"people": 4, "places": 1, "profile": 1}
"""How often each family of texts is drawn, relative to the others."""
FAMILY_KEYS = {"people": ("men", "women", "people", "others"), "places": ("villages", "islands", "mountains")}
PROFILE_KEYS = {"country": "landið", "capital": "høvuðsstaðurin", "currency": "gjaldoyrað"}


@dataclass(frozen=True)
class Vocabulary:
    """What the (key, value) pairs of a text are drawn from. `keys` and `names` are lists by kind of name."""

    keys: Mapping[str, Sequence[str]]
    names: Mapping[str, Sequence[str]]
    profiles: Sequence[Mapping[str, str]]


def vocabulary(part: Literal["train", "heldout", "all"]) -> Vocabulary:
    """The vocabulary of the training texts, of the held-out ones, or both together."""
    words = load_frames()["words"]
    parts = ("train", "heldout") if part == "all" else (part,)
    names = {kind: [name for one in parts for name in words["names"][one][kind]] for kind in words["names"]["train"]}
    return Vocabulary(
        keys=words["keys"],
        names={**names, "people": [*names["men"], *names["women"]]},
        profiles=[profile for one in parts for profile in profiles()[f"context_{one}"]],
    )


def draw_pairs(family: str, words: Vocabulary, count: int, rng: random.Random) -> list[tuple[str, str]]:
    """At most `count` (key, value) pairs with no key and no value twice."""
    if family == "profile":
        profile = rng.choice(words.profiles)
        pairs = [(name, profile[key]) for key, name in PROFILE_KEYS.items() if key in profile]
        return rng.sample(pairs, min(count, len(pairs)))
    called = rng.sample([(key, kind) for kind in FAMILY_KEYS[family] for key in words.keys[kind]], count)
    named = {rng.choice(words.names[kind]): key for key, kind in called}
    return [(key, name) for name, key in named.items()]


def draw_text(
    words: Vocabulary, rng: random.Random, most: int, least: int = 1
) -> tuple[str, list[tuple[str, str]], str]:
    """A family, pairs of it, and the sentence that lists them: `Her eru A, B og C.`"""
    family = rng.choices(list(FAMILIES), list(FAMILIES.values()))[0]
    spec = load_frames()["contexts"][family]
    pairs = draw_pairs(family, words, rng.randint(least, most), rng)
    *first, last = (spec["pair"]["text"].format(key=key, value=value) for key, value in pairs)
    opening = rng.choice(spec["openings"])["many" if first else "one"]
    return family, pairs, f"{opening} {', '.join(first)}{' og ' if first else ''}{last}."


def draw_context(words: Vocabulary, uses: Sequence[Use], rng: random.Random, least: int = 1) -> DemoRow:
    """One question about a text of `least` to 3 pairs, phrased by a frame of one of `uses`."""
    family, pairs, text = draw_text(words, rng, 3, least)
    frame = rng.choice([frame for frame in load_frames()["context_questions"] if frame["use"] in uses])
    key, value = rng.choice(pairs)
    question = fill(frame["text"], key=key)
    return DemoRow("", "context", family, key, frame["id"], question, (value,), text)


def draw_contexts(part: Literal["train", "heldout"], uses: Sequence[Use], count: int, seed: str) -> list[DemoRow]:
    """`count` different questions about different texts."""
    rng = random.Random(seed)
    words = vocabulary(part)
    rows: dict[str | None, DemoRow] = {}
    while len(rows) < count:
        row = draw_context(words, uses, rng, least=2)
        rows.setdefault(row.context, row)
    return list(rows.values())


# --- the split -----------------------------------------------------------------------------------------------------


def ask(fact: Fact, frame: Mapping[str, Any]) -> DemoRow:
    """One closed-book question."""
    question = fill(frame["text"], s=fact.subject)
    return DemoRow("", "fact", fact.relation, fact.subject, frame["id"], question, fact.answers)


def deal(fact: Fact) -> tuple[str, frozenset[str]]:
    """What is dealt together: a fact and its inverse (capital and country, the day before and the day after)."""
    family = {"country": "capital"}.get(fact.relation, fact.relation.removeprefix("next_").removeprefix("previous_"))
    ends = {fact.subject, fact.answers[0]} if family in ("capital", "day", "month") else {fact.subject}
    return family, frozenset(ends)


def split_facts(seed: int) -> dict[Use, list[Fact]]:
    """Each relation's facts dealt into `warmup`, `rl` and `heldout`."""
    hands: dict[str, dict[frozenset[str], list[Fact]]] = {}
    for fact in all_facts():
        family, ends = deal(fact)
        hands.setdefault(family, {}).setdefault(ends, []).append(fact)
    dealt: dict[Use, list[Fact]] = {"warmup": [], "rl": [], "heldout": []}
    for family, units in hands.items():
        shuffled = random.Random(f"{seed}-{family}").sample(list(units.values()), len(units))
        heldout, warmup = round(len(units) * HELDOUT_SHARE), round(len(units) * WARMUP_SHARE)
        for index, facts in enumerate(shuffled):
            part: Use = "heldout" if index < heldout else "warmup" if index < heldout + warmup else "rl"
            dealt[part] += facts
    return dealt


def ask_all(facts: Iterable[Fact], uses: Sequence[Use], per_fact: int, seed: str) -> list[DemoRow]:
    """Every fact in `per_fact` phrasings drawn from those of `uses`."""
    rng = random.Random(seed)
    rows = []
    for fact in facts:
        frames = [frame for frame in load_frames()["relations"][fact.relation] if frame["use"] in uses]
        rows += [ask(fact, frame) for frame in rng.sample(frames, min(per_fact, len(frames)))]
    return rows


def finish(rows: list[DemoRow], split: Use, seed: int) -> list[DemoRow]:
    """The rows shuffled and numbered."""
    shuffled = random.Random(f"{seed}-order-{split}").sample(rows, len(rows))
    return [replace(row, id=f"{split}-{index:04d}") for index, row in enumerate(shuffled)]


def states(sentence: str, fact: Fact) -> bool:
    """Whether the sentence names the fact's subject and one of its answers, each as whole words."""

    def has(words: str) -> bool:
        return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", sentence, re.IGNORECASE) is not None

    return has(fact.subject) and any(has(answer) for answer in fact.answers)


def build_text(heldout: Sequence[Fact], forbidden: frozenset[str | None], seed: int) -> list[str]:
    """Unlabelled sentences and little stories. None states a held-out fact or holds a text that is asked about.

    `forbidden`: the contexts of all splits.
    """
    rng = random.Random(f"{seed}-text")
    frames, lists, words = load_frames(), word_lists(), vocabulary("all")
    sentences: dict[str, None] = {}
    for frame in frames["text"]:
        for word in lists[frame["list"]]:
            other = rng.choice([one for one in lists[frame["list"]] if one != word])
            sentences[fill(frame["text"], s=word, t=other)] = None
    plain_rows = rng.sample(list(sentences), min(len(sentences), round(TEXT_ROWS * (1 - STORY_SHARE))))
    stories: dict[str, None] = {}
    while len(stories) < TEXT_ROWS - len(plain_rows):
        _, pairs, told = draw_text(words, rng, 3)
        key, value = rng.choice(pairs)
        if told not in forbidden:
            stories[f"{told} {fill(frames['story']['text'], key=key, value=value)}"] = None
    rows = [row for row in [*plain_rows, *stories] if not any(states(row, fact) for fact in heldout)]
    return rng.sample(rows, len(rows))


def build_demo_data(seed: int = 0) -> DemoData:
    """The whole demo, the same for the same seed and package versions."""
    facts = split_facts(seed)
    warmup = ask_all(facts["warmup"], ("warmup",), 2, f"{seed}-warmup")
    # A currency can name a region: Senegal's tells where Senegal lies.
    warmup = [row for row in warmup if not any(states(row.stated(), fact) for fact in facts["heldout"])]
    # RL does not ask again what the warm-up told: each visit goes to a fact that only the teacher can give.
    rl = ask_all([*facts["rl"], *facts["heldout"]], ("warmup", "rl"), RL_FRAMES_PER_FACT, f"{seed}-rl")
    heldout = ask_all(facts["heldout"], ("heldout",), HELDOUT_FRAMES_PER_FACT, f"{seed}-heldout")
    told = draw_contexts("train", ("warmup", "rl"), CONTEXT_ROWS["warmup"] + CONTEXT_ROWS["rl"], f"{seed}-contexts")
    first = [row for row in told if row.frame in warmup_frames()][: CONTEXT_ROWS["warmup"]]
    rest = [row for row in told if row not in first]
    unseen = draw_contexts("heldout", ("heldout",), CONTEXT_ROWS["heldout"], f"{seed}-unseen")
    contexts = frozenset(row.context for row in [*told, *unseen])
    return DemoData(
        warmup=finish(warmup + first, "warmup", seed),
        rl=finish(rl + rest, "rl", seed),
        heldout=finish(heldout + unseen, "heldout", seed),
        text=build_text(facts["heldout"], contexts, seed),
    )


def warmup_frames() -> set[str]:
    """Ids of the question frames that the warm-up may use."""
    frames = load_frames()
    every = [*frames["context_questions"], *(frame for relation in frames["relations"].values() for frame in relation)]
    return {frame["id"] for frame in every if frame["use"] == "warmup"}


# --- what the teacher learns ---------------------------------------------------------------------------------------


def teacher_facts() -> list[DemoRow]:
    """Every fact in every phrasing, the held-out ones too: the teacher is the one who knows."""
    relations = load_frames()["relations"]
    return [ask(fact, frame) for fact in all_facts() for frame in relations[fact.relation]]


def teacher_contexts(data: DemoData, count: int, seed: int) -> list[DemoRow]:
    """`count` questions about texts made of all words, none of them a held-out text."""
    rng = random.Random(f"{seed}-teacher")
    words = vocabulary("all")
    unseen = {row.context for row in data.heldout}
    rows = (draw_context(words, ("warmup", "rl", "heldout"), rng) for _ in range(count))
    return [row for row in rows if row.context not in unseen]


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One object a line, written beside and renamed."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)


def write_demo_data(directory: str | Path, seed: int = 0) -> dict[str, Path]:
    """Write warmup, rl, heldout and text as JSONL below `directory`; their paths by name."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    data = build_demo_data(seed)
    tables: dict[str, list[dict[str, Any]]] = {
        "warmup": [row.as_json() for row in data.warmup],
        "rl": [row.as_json() for row in data.rl],
        "heldout": [row.as_json() for row in data.heldout],
        "text": [{"text": text} for text in data.text],
    }
    paths = {name: directory / f"{name}.jsonl" for name in tables}
    for name, rows in tables.items():
        write_jsonl(paths[name], rows)
    return paths
