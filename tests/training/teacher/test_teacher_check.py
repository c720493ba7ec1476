"""Minimal pairs at the start of stage 2: the numbers of a plain forward pass, and a warning that fits them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from configs.io.results import Result, Value, read_result
from configs.models import StudentConfig, TeacherConfig
from configs.prompts import Format
from configs.schema import DataConfig, EvalConfig, RunConfig
from eval.measures.model import Model
from eval.measures.perplexity import score_texts
from inference.attention.packing import Group
from rewards.minimal_pairs import Pair, make_pairs, score_pairs, sentences_of
from tests.support.tiny_tokenizers import build_tokenizer
from training.experience import Rollout
from training.teacher.check import as_rollout, teacher_check, warning
from training.teacher.facts import teacher_facts
from training.teacher.link import TeacherLink


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
def test_each_sentence_has_the_tokens_that_the_tokenizer_gives_it(kind: str) -> None:
    tokenizer = build_tokenizer(kind)
    pair = Pair("The islands lie in the north.", "The islands in lie the north.", "swap")
    rollout = as_rollout(Format(tokenizer), [pair])
    for text, response in zip((pair.right, pair.wrong), rollout.responses_B, strict=True):
        assert [*rollout.prompts_N[0].tokens, *response] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("student_kind", ["byte_level", "sentencepiece"])
@pytest.mark.parametrize("chat", [("s",), ("t",), ("s", "t")])
def test_chat_models_read_plain_text_too(chat: tuple[str, ...], student_kind: str, tmp_path: Path) -> None:
    """A user's message of one word has no second half of a sentence as its answer."""
    for name, kind in (("s", student_kind), ("t", "byte_level")):
        tokenizer = build_tokenizer(kind)
        tokenizer.chat_template = "<s>{{ messages[0]['content'] }}</s>" if name in chat else None
        tokenizer.save_pretrained(tmp_path / name)
    config = RunConfig(
        student=StudentConfig(path=str(tmp_path / "s")), teacher=TeacherConfig(path=str(tmp_path / "t")),
        data=DataConfig(text=str(tmp_path / "text.jsonl")), eval=EvalConfig(minimal_pairs=3),
    )  # fmt: skip
    rows = [{"text": text} for text in ("The islands lie in the north.", "The sheep stay on the hills in the winter.")]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read: list[str] = []
    teacher = build_tokenizer("byte_level")

    class Listener:
        def info(self) -> Any:
            return SimpleNamespace(max_positions=256)

        def score(self, groups: Sequence[Group]) -> Future[torch.Tensor]:
            read.extend(teacher.decode([*group.prompt, *r]) for group in groups for r in group.responses)
            out: Future[torch.Tensor] = Future()
            out.set_result(torch.zeros(sum(len(r) for group in groups for r in group.responses)))
            return out

    class Student:
        def logprobs(self, rollout: Rollout, temperature: float) -> torch.Tensor:
            return torch.zeros(int(rollout.lengths_B.sum()))

    link = TeacherLink(Listener(), teacher_facts(config, config.teacher), None)  # type: ignore[arg-type]
    found = teacher_check(Student(), link, config, [])  # type: ignore[arg-type]
    pairs = make_pairs([row["text"] for row in rows], 3, config.seed)
    assert found.data["rows"] == len(pairs) == 2
    assert read == [text for pair in pairs for text in (pair.right, pair.wrong)]
