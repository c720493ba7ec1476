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
import random
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from configs.io.files import write_atomically
from training.data.demo import tell
from training.data.demo.world import Fact, all_facts, load_frames, profiles, word_lists

Use = Literal["warmup", "rl", "heldout"]
Kind = Literal["fact", "context", "tell"]

HELDOUT_SHARE = 0.27
WARMUP_SHARE = 0.33
"""Shares of each relation's facts that are held out, and that the warm-up tells; RL alone asks the rest."""
RL_FRAMES_PER_FACT = 3
HELDOUT_FRAMES_PER_FACT = 1
CONTEXT_ROWS: Mapping[Use, int] = {"warmup": 90, "rl": 1200, "heldout": 110}
TELL_ROWS: Mapping[Use, int] = {"warmup": 0, "rl": 384, "heldout": 96}
TEXT_ROWS = 6000
STORY_SHARE = 0.85
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
    pattern: str | None = None
    """Regular expression of the right answers, where a list of them would be too long."""

    def stated(self) -> str:
        """Everything that the row says, answers included."""
        return " ".join((self.context or "", self.question, *self.answers))

    def as_json(self) -> dict[str, Any]:
        """The row as it is written: `context` only where there is one."""
        row = asdict(self) | {"answers": list(self.answers) or None}
        return {key: value for key, value in row.items() if value is not None}


@dataclass(frozen=True)
class DemoData:
    """The splits and the unlabelled text."""

    warmup: list[DemoRow]
    rl: list[DemoRow]
    heldout: list[DemoRow]
    open: list[DemoRow]
    """Open questions in held-out phrasings, each with the pattern of its right answers."""
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


def vocabulary() -> Vocabulary:
    """What every text is made of."""
    words = load_frames()["words"]
    names = words["names"]
    return Vocabulary(
        keys=words["keys"],
        names={**names, "people": [*names["men"], *names["women"]]},
        profiles=profiles()["context"],
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


def draw_contexts(
    uses: Sequence[Use], count: int, seed: str, taken: Container[str | None] = frozenset()
) -> list[DemoRow]:
    """`count` different questions about different texts, none of them `taken`."""
    rng, words = random.Random(seed), vocabulary()
    rows: dict[str | None, DemoRow] = {}
    while len(rows) < count:
        row = draw_context(words, uses, rng, least=2)
        if row.context not in taken:
            rows.setdefault(row.context, row)
    return list(rows.values())


def ask_to_tell(split: Use, seed: int) -> list[DemoRow]:
    """Open questions of one split, `TELL_ROWS` of them."""
    every = list(tell.questions(seed, heldout=split == "heldout"))
    chosen = random.Random(f"{seed}-tell-{split}").sample(every, TELL_ROWS[split])
    return [
        DemoRow("", "tell", kind, place, f"tell-{kind}", question, (), pattern=tell.right_answers(kind, place))
        for kind, place, question in chosen
    ]


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


def finish(rows: list[DemoRow], split: str, seed: int) -> list[DemoRow]:
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
    frames, lists, words = load_frames(), word_lists(), vocabulary()
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
    told = draw_contexts(("warmup", "rl"), CONTEXT_ROWS["warmup"] + CONTEXT_ROWS["rl"], f"{seed}-contexts")
    first = [row for row in told if row.frame in warmup_frames()][: CONTEXT_ROWS["warmup"]]
    chosen = set(map(id, first))
    rest = [row for row in told if id(row) not in chosen]
    taken = {row.context for row in told}
    unseen = draw_contexts(("heldout",), CONTEXT_ROWS["heldout"], f"{seed}-unseen", taken)
    contexts = frozenset(row.context for row in [*told, *unseen])
    return DemoData(
        warmup=finish(warmup + first, "warmup", seed),
        rl=finish(rl + rest + ask_to_tell("rl", seed), "rl", seed),
        heldout=finish(heldout + unseen, "heldout", seed),
        open=finish(ask_to_tell("heldout", seed), "open", seed),
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
    words = vocabulary()
    unseen = {row.context for row in data.heldout}
    rows = (draw_context(words, ("warmup", "rl", "heldout"), rng) for _ in range(count))
    return [row for row in rows if row.context not in unseen]


def teacher_tells(count: int, seed: int) -> list[DemoRow]:
    """`count` open questions, in all phrasings, each with a right answer drawn at random."""
    rng = random.Random(f"{seed}-teacher-tells")
    every = [*tell.questions(seed, heldout=False), *tell.questions(seed, heldout=True)]
    drawn = (rng.choice(every) for _ in range(count))
    return [
        DemoRow("", "tell", kind, place, "", question, (tell.draw_answer(kind, place, rng),))
        for kind, place, question in drawn
    ]


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One object a line."""
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_demo_data(directory: str | Path, seed: int = 0) -> dict[str, Path]:
    """Write warmup, rl, heldout and text as JSONL below `directory`; their paths by name."""
    data = build_demo_data(seed)
    tables: dict[str, list[dict[str, Any]]] = {
        "warmup": [row.as_json() for row in data.warmup],
        "rl": [row.as_json() for row in data.rl],
        "heldout": [row.as_json() for row in data.heldout],
        "open": [row.as_json() for row in data.open],
        "text": [{"text": text} for text in data.text],
    }
    paths = {name: Path(directory) / f"{name}.jsonl" for name in tables}
    for name, rows in tables.items():
        write_jsonl(paths[name], rows)
    return paths
