"""SQuAD-style metrics against numbers worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.answers import answer_row, exact_match, normalise, open_scores, token_f1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Tórshavn.\n", "tórshavn"),
        ("The “Føroyar” – a\u00a0land!", "føroyar land"),
        ("a\u0301in", "áin"),  # decomposed á is á, and not the article `a`
        ("á einum ÁRI, 3 €", "á einum ári 3"),
        ("U.S.", "us"),
        ("...", ""),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_token_f1_by_hand() -> None:
    # Prediction 4 words, answer 3 words, 2 in common: precision 2/4, recall 2/3, F1 = 2*(1/2)*(2/3)/(7/6) = 4/7.
    assert token_f1("Í Havn búgva fólk", ["fólk í Vági"]) == pytest.approx(4 / 7)
    # Repeated words count as often as they stand in both: common 1, precision 1/3, recall 1/1, F1 = 1/2.
    assert token_f1("ja ja ja", ["ja"]) == pytest.approx(0.5)


def test_best_accepted_answer_counts() -> None:
    assert token_f1("Keypmannahavn", ["København", "Keypmannahavn"]) == 1.0
    assert exact_match("keypmannahavn.", ["København", "Keypmannahavn"]) == 1.0
    assert exact_match("Keypmannahavn í Danmark", ["Keypmannahavn"]) == 0.0


def test_empty_prediction() -> None:
    assert token_f1("", ["Oslo"]) == 0.0
    assert exact_match("", ["Oslo"]) == 0.0
    assert token_f1("!", ["..."]) == 1.0


def test_a_row_in_percent() -> None:
    row = answer_row({"question": "Hvar?", "answers": ["Reykjavík"], "context": None, "other": 1}, "í Reykjavík")
    # F1: 2*(1/2)*1/(3/2) = 2/3.
    assert row.pop("f1") == pytest.approx(200 / 3)
    expected = {"question": "Hvar?", "answers": ["Reykjavík"], "prediction": "í Reykjavík", "exact_match": 0.0}
    assert row == expected


def test_open_answers_match_whole_and_count_once_when_they_are_alike() -> None:
    patterns = ["a+", "a+", "a+", "a+", "b|c"]
    found = open_scores(patterns, ["aa", "aa", "a", "ab", "c"])
    assert found == {"open_right": pytest.approx(80.0), "open_different": pytest.approx(60.0)}
    assert open_scores([], []) == {"open_right": 0.0, "open_different": 0.0}


def test_decomposed_answers_are_right_too() -> None:
    """A model or a question in Unicode's NFD: `á` as `a` and U+0301."""
    found = open_scores(["á|í", "a\u0301", "á|í"], ["a\u0301", "á", "á"])
    assert found == {"open_right": pytest.approx(100.0), "open_different": pytest.approx(200 / 3)}


def test_misuse_is_an_error() -> None:
    with pytest.raises(TypeError, match="list of strings"):
        token_f1("Oslo", "Oslo")
    with pytest.raises(ValueError, match="at least one accepted answer"):
        exact_match("Oslo", [])


@given(st.text(), st.text())
def test_bounds_and_symmetry(one: str, other: str) -> None:
    forward, backward = token_f1(one, [other]), token_f1(other, [one])
    assert 0.0 <= forward <= 1.0
    assert forward == pytest.approx(backward)
    assert exact_match(one, [other]) <= forward
    assert token_f1(one, [one]) == 1.0
