"""Minimal pairs at the start of stage 2: the numbers of a plain forward pass, and a warning that fits them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.io.results import Result, Value, read_result
from configs.prompts import Format
from eval.measures.model import Model
from eval.measures.perplexity import score_texts
from rewards.minimal_pairs import Pair, make_pairs, score_pairs, sentences_of
from tests.support.tiny_tokenizers import build_tokenizer
from training.teacher.check import as_rollout, warning


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory, train: Callable[..., Any]) -> tuple[Path, str]:
    """(the folder of a run that asked for 16 pairs, what it said)."""
    runs = tmp_path_factory.mktemp("checked")
    done = train(runs, "--steps", "1", "--eval.questions", "4", "--eval.minimal_pairs", "16")
    return runs / "grpo-minillm", done.stderr


def test_both_models_are_scored_as_by_a_plain_forward_pass(checked: tuple[Path, str]) -> None:
    run, _ = checked
    found = read_result(run / "eval" / "minimal_pairs.json")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    texts = [json.loads(line)["text"] for line in Path(settings["data"]["text"]).read_text().splitlines()]
    from training.teacher.check import split_sentences

    pairs = make_pairs(split_sentences(texts), 16, settings["seed"])
    assert found.data["rows"] == len(pairs) == 16
    for who in ("student", "teacher"):
        model = Model(path=settings[who]["path"])
        scored = score_texts(model.network, model.tokenizer, sentences_of(pairs), 32)
        logprobs = [0.0 if one is None else -one.nats for one in scored]
        expected = score_pairs(pairs, logprobs[: len(pairs)], logprobs[len(pairs) :])
        # The demo's models know no start symbol, so the first word is all the context that both have.
        for name, (value, *_) in expected.items():
            assert found.numbers[f"{who}/{name}"] == pytest.approx(value, rel=1e-3, abs=1e-3)


def test_the_run_warns_as_the_numbers_say(checked: tuple[Path, str]) -> None:
    run, said = checked
    line = warning(read_result(run / "eval" / "minimal_pairs.json"))
    assert (line is None) == ("judge of Faroese" not in said)
    assert line is None or line in said


def test_the_report_shows_it(checked: tuple[Path, str]) -> None:
    run, _ = checked
    found = read_result(run / "eval" / "minimal_pairs.json").numbers
    page = (run / "report.html").read_text()
    assert "Right and wrong sentences" in page
    for who in ("student", "teacher"):
        row = f'<tr><th scope="row">{who.capitalize()}</th><td>{100 * found[f"{who}/accuracy"]:.1f}</td>'
        assert row in page
        assert f"<td>{found[f'{who}/correlation']:.3f}</td></tr>" in page


def check_of(values: dict[str, Value]) -> Result:
    """What a check of 50 pairs found."""
    return Result(measure="teacher_check", model="m", data={"rows": 50}, settings={}, versions={}, values=values)


@pytest.mark.parametrize(
    ("teacher", "student", "low", "words"),
    [(0.9, 0.6, 0.1, None), (0.7, 0.6, -0.1, "not clearly a better judge"), (0.5, 0.6, -0.3, "no better judge")],
)
def test_warning(teacher: float, student: float, low: float, words: str | None) -> None:
    values = {"teacher/accuracy": Value(teacher), "student/accuracy": Value(student)}
    values["difference"] = Value(teacher - student, low, 0.3)
    line = warning(check_of(values))
    assert line is None if words is None else words in str(line)


def test_no_sentence_is_said() -> None:
    assert "not compared" in str(warning(check_of({})))


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "unigram"])
@pytest.mark.parametrize("chat", [None, "{{ messages[0]['content'] }}"])
def test_each_sentence_has_the_tokens_that_the_tokenizer_gives_it(kind: str, chat: str | None) -> None:
    tokenizer = build_tokenizer(kind)
    tokenizer.chat_template = chat
    pair = Pair("The islands lie in the north.", "The islands in lie the north.", "swap")
    rollout = as_rollout(Format(tokenizer, "auto"), [pair])
    for text, response in zip((pair.right, pair.wrong), rollout.responses_B, strict=True):
        assert [*rollout.prompts_N[0].tokens, *response] == tokenizer(text)["input_ids"]
