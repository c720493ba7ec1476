"""The demo's data: real names, nominative frames, three splits with no leak."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from training.data.demo import tell
from training.data.demo.sentences import (
    DemoData,
    build_demo_data,
    split_facts,
    states,
    teacher_contexts,
    write_demo_data,
)
from training.data.demo.world import all_facts, capital_of, days, load_frames, months

# What stands right before (or after) a slot, for each construct that a frame may declare.
BEFORE = {
    "eitur": r"eitur$",
    "er": r"(\ber|\bvar)$",
    "colon": r":$",
    "subject": r"^$",
    "clause": r"(,? (hvat|hvussu)|^Ja,)$",
    "listed": r"^$",
    "apposition": r"^\{key\}$",
    "both": r"^$|\bog$",
}
GOVERNING = re.compile(r"\b(í|á|til|frá|hjá|við|um|av|úr|eftir|fyri|móti|hava|hevur|sær|kennir) \{")
"""Prepositions and verbs that take another case, right before a slot."""


def frames() -> Iterator[dict[str, Any]]:
    """Every frame that has slots."""
    loaded = load_frames()
    for relation in loaded["relations"].values():
        yield from relation
    yield from loaded["context_questions"]
    yield from loaded["text"]
    yield loaded["story"]
    yield from loaded["tell"]["countries"]
    for kind in ("places", "statements"):
        for frames_of in loaded["tell"][kind].values():
            yield from frames_of
    for context in loaded["contexts"].values():
        yield context["pair"]


@pytest.fixture(scope="module")
def data() -> DemoData:
    return build_demo_data(0)


def test_every_slot_keeps_the_nominative() -> None:
    checked = 0
    for frame in frames():
        for slot, construct in frame["slots"].items():
            before = frame["text"].split("{" + slot + "}")[0].rstrip()
            assert re.search(BEFORE[construct], before), f"{frame['text']}: {slot} is not {construct}"
            checked += 1
        assert not GOVERNING.search(frame["text"]), frame["text"]
        assert set(re.findall(r"\{(\w+)\}", frame["text"])) == set(frame["slots"]), frame["text"]
    assert checked > 80


def test_facts_and_names_are_the_real_faroese_ones() -> None:
    facts = {(fact.relation, fact.subject): fact.answers for fact in all_facts()}
    assert facts[("next_day", "mánadagur")] == ("týsdagur",)
    assert facts[("previous_month", "januar")] == ("desember",)
    assert [capital_of(code) for code in ("DK", "RU", "IS", "SE", "GR", "PL")] == [
        "Keypmannahavn", "Moskva", "Reykjavík", "Stokkhólm", "Aten", "Varsjava",
    ]  # fmt: skip
    assert days()[0] == "mánadagur"
    assert (months()[0], months()[4]) == ("januar", "mai")
    capitals = [(subject, answers) for (relation, subject), answers in facts.items() if relation == "capital"]
    assert len(capitals) > 50
    assert all(len(answers) >= 1 for _, answers in capitals)


def test_sizes_and_kinds(data: DemoData) -> None:
    assert 300 <= len(data.warmup) <= 500
    assert {row.kind for row in data.rl} == {"fact", "context", "tell"}
    assert 2000 <= len(data.rl) <= 3000
    assert 200 <= len(data.heldout) <= 260
    assert len(data.open) == 96
    assert len(data.text) >= 5000
    context = sum(row.kind == "context" for row in data.heldout) / len(data.heldout)
    assert 0.4 < context < 0.6


def test_held_out_questions_and_phrasings_are_unseen(data: DemoData) -> None:
    seen = [*data.warmup, *data.rl]
    assert not {row.frame for row in data.heldout} & {row.frame for row in seen}
    assert not {row.question for row in data.heldout if row.kind == "fact"} & {row.question for row in seen}
    assert not {(row.context, row.question) for row in data.heldout} & {(row.context, row.question) for row in seen}


def test_the_warm_up_and_the_raw_text_state_no_held_out_fact(data: DemoData) -> None:
    heldout = split_facts(0)["heldout"]
    assert len(heldout) > 80
    assert {(row.relation, row.subject) for row in data.heldout if row.kind == "fact"} == {
        (fact.relation, fact.subject) for fact in heldout
    }
    for stated in [*(row.stated() for row in data.warmup), *data.text]:
        for fact in heldout:
            assert not states(stated, fact), f"{stated} states {fact}"


def test_held_out_texts_are_asked_about_nowhere_else_and_told_nowhere(data: DemoData) -> None:
    texts = {row.context for row in data.heldout if row.context}
    assert not texts & {row.context for row in [*data.warmup, *data.rl]}
    assert not any(text.startswith(tuple(filter(None, texts))) for text in data.text)


def test_open_questions_are_new_combinations_and_the_rule_knows_right_from_wrong(data: DemoData) -> None:
    """Right: a country of that place, true things, each kind once. Norway by hand, the rest by the generator."""
    assert not {row.question for row in data.open} & {row.question for row in data.rl}
    rule = re.compile(tell.right_answers("region", "Norðurevropa"))
    right = "Landið eitur Noreg. Gjaldoyrað er norsk króna. Høvuðsstaðurin eitur Oslo."
    assert rule.fullmatch(right)
    wrong = [
        right.replace("Oslo", "Keypmannahavn"),
        right.replace("norsk", "svensk"),
        right.replace("Noreg", "Spania"),
        right + " Høvuðsstaðurin er Oslo.",
        right.removesuffix("."),
        right + " Ja.",
        "Landið eitur Noreg.",
        "",
    ]
    assert not any(rule.fullmatch(answer) for answer in wrong)
    rng = random.Random(0)
    for kind, place in tell.places():
        pattern = re.compile(tell.right_answers(kind, place))
        assert all(pattern.fullmatch(tell.draw_answer(kind, place, rng)) for _ in range(50))
        other = next(one for one in tell.places() if one[0] == kind and one[1] != place)
        assert not any(pattern.fullmatch(tell.draw_answer(*other, rng)) for _ in range(20))


def test_the_teacher_is_not_trained_on_held_out_texts(data: DemoData) -> None:
    texts = {row.context for row in teacher_contexts(data, 2000, 0)}
    assert not texts & {row.context for row in data.heldout}


def test_answers_to_a_text_stand_in_it(data: DemoData) -> None:
    rows = [row for row in [*data.warmup, *data.rl, *data.heldout] if row.context is not None]
    assert len(rows) > 400
    for row in rows:
        assert row.answers[0] in (row.context or "")
        assert row.subject in (row.context or "")


def test_the_files_hold_the_rows_and_the_build_is_repeatable(tmp_path: Path, data: DemoData) -> None:
    paths = write_demo_data(tmp_path / "one")
    again = write_demo_data(tmp_path / "two")
    for name in ("warmup", "rl", "heldout", "open", "text"):
        assert paths[name].read_bytes() == again[name].read_bytes()
    rows = [json.loads(line) for line in paths["heldout"].read_text().split("\n") if line]
    assert rows == [row.as_json() for row in data.heldout]
    assert build_demo_data(1).heldout != data.heldout
