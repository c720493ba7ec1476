"""Minimal pairs at the start of stage 2: the numbers of a plain forward pass, and a warning that fits them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from eval.minimal_pairs import judge
from eval.perplexity import load_model
from rewards.minimal_pairs import make_pairs
from tests.runs import command, finish
from training.teacher_check import warning


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory, demo_cache: Path) -> tuple[Path, str]:
    """(the folder of a run that asked for 16 pairs, what it said)."""
    runs = tmp_path_factory.mktemp("checked")
    done = finish(command(runs, demo_cache, "--steps", "1", "--eval.questions", "4", "--eval.minimal_pairs", "16"))
    return runs / "grpo-minillm", done.stderr


def test_both_models_are_scored_as_by_a_plain_forward_pass(checked: tuple[Path, str]) -> None:
    run, _ = checked
    found = json.loads((run / "eval" / "minimal_pairs.json").read_text())
    settings = yaml.safe_load((run / "config.yaml").read_text())
    texts = [json.loads(line)["text"] for line in Path(settings["data"]["text"]).read_text().splitlines()]
    from training.teacher_check import split_sentences

    pairs = make_pairs(split_sentences(texts), 16, settings["seed"])
    assert found["pairs"] == len(pairs) == 16
    for who in ("student", "teacher"):
        expected, _ = judge(*load_model(settings[who]["path"]), pairs)
        got = found[who]
        # The demo's models know no start symbol, so the first word is all the context that both have.
        assert got["bits_per_character"] == pytest.approx(expected.bits_per_character, rel=1e-3)
        assert got["correlation"] == pytest.approx(expected.correlation, abs=1e-3)
        assert got["accuracy_by_kind"] == pytest.approx(expected.accuracy_by_kind)


def test_the_run_warns_as_the_numbers_say(checked: tuple[Path, str]) -> None:
    run, said = checked
    line = warning(json.loads((run / "eval" / "minimal_pairs.json").read_text()))
    assert (line is None) == ("judge of Faroese" not in said)
    assert line is None or line in said


def test_the_report_shows_it(checked: tuple[Path, str]) -> None:
    run, _ = checked
    found = json.loads((run / "eval" / "minimal_pairs.json").read_text())
    page = (run / "report.html").read_text()
    assert "Right and wrong sentences" in page
    for who in ("student", "teacher"):
        scores = found[who]
        row = f'<tr><th scope="row">{who.capitalize()}</th><td>{100 * scores["accuracy"]:.1f}</td>'
        assert row in page
        assert f"<td>{scores['correlation']:.3f}</td></tr>" in page


@pytest.mark.parametrize(
    ("teacher", "student", "low", "words"),
    [(0.9, 0.6, 0.1, None), (0.7, 0.6, -0.1, "not clearly a better judge"), (0.5, 0.6, -0.3, "no better judge")],
)
def test_warning(teacher: float, student: float, low: float, words: str | None) -> None:
    found = {
        "pairs": 50,
        "teacher": {"accuracy": teacher},
        "student": {"accuracy": student},
        "difference": {"low": low, "high": 0.3},
    }
    line = warning(found)
    assert line is None if words is None else words in str(line)


def test_no_sentence_is_said() -> None:
    assert "not compared" in str(warning({"pairs": 0}))
