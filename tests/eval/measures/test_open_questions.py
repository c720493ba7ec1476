"""eval/measures/open_questions.py: samples are held to their patterns, and counted once for each pattern."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval.measures.model import Model
from eval.measures.open_questions import OpenSettings, open_questions
from eval.pages.compare_scores import read_folder
from tests.eval.measures.test_heldout import ANSWERS, save_model

ANY_TWO = f"({'|'.join(ANSWERS)}) ({'|'.join(ANSWERS)})"
QUESTIONS = [
    {"id": "a", "question": "Hvat eitur?", "pattern": ".*"},
    {"id": None, "question": "Hvat?", "pattern": ANY_TWO},
    {"id": "c", "question": "Hvat eitur Oslo?", "pattern": ".*"},
    {"id": "a", "question": "Hvat eitur Noreg?", "pattern": "x"},
]


@pytest.fixture
def settings(tmp_path: Path) -> OpenSettings:
    file = tmp_path / "open.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return OpenSettings(data=file, max_new_tokens=2, samples=8, batch=5)


def test_answers_are_counted_by_pattern(tmp_path: Path, settings: OpenSettings) -> None:
    model = Model(path=str(save_model(tmp_path / "model")))
    found = open_questions(model, settings)
    everything, two, none = found.rows
    assert [row["id"] for row in found.rows] == [".*", ANY_TWO, "x"], (
        "ids of the data may be missing, or be there twice"
    )
    assert everything["questions"] == ["Hvat eitur?", "Hvat eitur Oslo?"]
    assert len(everything["answers"]) == 16
    assert len(two["answers"]) == 8
    assert everything["right"] == 16  # whatever is said matches
    assert everything["different"] == len(set(everything["answers"])) < 16
    words = [text.split() for text in two["answers"]]
    assert two["right"] == sum(len(text) == 2 and set(text) <= set(ANSWERS) for text in words)
    assert none["right"] == none["different"] == 0
    assert found.values["open_right"].value == pytest.approx(100 * (16 + two["right"]) / 32)
    assert found.values["open_different"].value == pytest.approx(
        100 * (everything["different"] + two["different"]) / 32
    )
    assert open_questions(model, settings).rows == found.rows  # a seed says the same again

    found.write(tmp_path / "eval" / "open_questions.json")
    scores = read_folder(tmp_path / "eval")
    assert scores["open/right"].value == found.values["open_right"].value
    assert scores["open/right"].low is not None


def test_a_prompt_that_leaves_no_room_is_named(tmp_path: Path, settings: OpenSettings) -> None:
    settings.data.write_text(json.dumps({"question": "Hvat " * 70, "pattern": "x"}) + "\n")
    with pytest.raises(ValueError, match="2 of the 64 that the model has room for: every prompt"):
        open_questions(Model(path=str(save_model(tmp_path / "model"))), settings)
