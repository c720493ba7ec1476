"""A teacher behind an endpoint, against a local one with faults: no answer is lost, none is asked twice."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs.learning import ApiConfig, RewardConfig
from configs.schema import RunConfig
from rewards.base import RewardInput
from tests.support.api_endpoint import FAULTS, Endpoint
from tests.support.forked import finish_forked
from tests.support.runs import ROOT, environment, metrics
from tests.training.run.test_leaving import wait_until
from training import distributed
from training.teacher import api_teacher
from training.teacher.api_teacher import (
    KEY,
    ApiRefused,
    ApiTeacher,
    Messages,
    ReplyCache,
    StoredReply,
    marks,
    parse_completion,
    parse_mark,
)
from training.teacher.reward_parts import configured_parts

pytest.importorskip("openai")
TEMPORARY = [name for name in FAULTS if name != "401"]


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "a-key-for-tests")


def config(endpoint: Endpoint, **values: object) -> ApiConfig:
    quick = {"timeout_s": 30.0, "attempts": 4} | values
    return ApiConfig(model="m", base_url=endpoint.url, **quick)  # type: ignore[arg-type]


def question(text: str) -> Messages:
    return [{"role": "system", "content": "Svara."}, {"role": "user", "content": text}]


@pytest.mark.parametrize("fault", TEMPORARY)
def test_a_passing_fault_is_retried(fault: str, tmp_path: Path) -> None:
    with Endpoint(lambda text, n: fault if text == "b" and n < 2 else "ok") as endpoint:
        patience = 1.0 if fault == "time-out" else 30.0
        teacher = ApiTeacher(config(endpoint, timeout_s=patience, attempts=8), tmp_path / "cache.jsonl")
        replies = teacher.ask([question("a"), question("b"), question("c")])
    assert replies == ["svar: a", "svar: b", "svar: c"]
    if fault == "time-out":  # on a busy machine a good reply may come too late as well
        assert endpoint.asked["b"] >= 3
        return
    assert endpoint.asked == {"a": 1, "b": 3, "c": 1}
    assert (teacher.usage.requests, teacher.usage.asked, teacher.usage.unanswered) == (5, 3, 0)


@pytest.mark.parametrize("fault", ["500", "malformed", "half-closed"])
def test_a_lasting_fault_is_reported_and_asked_again_later(
    fault: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = {"b"}
    with Endpoint(lambda text, n: fault if text in broken else "ok") as endpoint:
        teacher = ApiTeacher(config(endpoint, attempts=2), tmp_path / "cache.jsonl")
        assert teacher.ask([question("a"), question("b")]) == ["svar: a", None]
        assert teacher.usage.unanswered == 1
        assert "no answer after 2 attempts" in caplog.text
        assert "'content': 'b'" in caplog.text
        broken.clear()
        again = ApiTeacher(config(endpoint), tmp_path / "cache.jsonl")
        assert again.ask([question("a"), question("b")]) == ["svar: a", "svar: b"]
    assert endpoint.asked == {"a": 1, "b": 3}
    assert again.usage.from_cache == 1


def test_a_refusal_is_not_retried_and_loses_nothing(tmp_path: Path) -> None:
    with Endpoint(lambda text, n: "401" if text == "b" else "ok") as endpoint:
        teacher = ApiTeacher(config(endpoint, parallel=1), tmp_path / "cache.jsonl")
        with pytest.raises(ApiRefused, match=r"401.*no such key"):
            teacher.ask([question("a"), question("b"), question("c")])
        assert endpoint.asked["b"] == 1
        assert ApiTeacher(config(endpoint), tmp_path / "cache.jsonl").ask([question("a")]) == ["svar: a"]
    assert endpoint.asked["a"] == 1


def test_what_the_endpoint_asks_to_wait_is_waited(tmp_path: Path) -> None:
    with Endpoint(lambda text, n: "429" if n == 0 else "ok") as endpoint:
        ApiTeacher(config(endpoint), tmp_path / "cache.jsonl").ask([question("a")])
    assert endpoint.times[1] - endpoint.times[0] >= 0.3


def test_requests_keep_to_the_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight that want to leave at the same time each waits a tenth of a second longer."""
    waited: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: 1000.0, sleep=waited.append)
    monkeypatch.setattr(api_teacher, "time", clock)
    with Endpoint() as endpoint:
        teacher = ApiTeacher(config(endpoint, requests_per_minute=600.0, parallel=8), tmp_path / "cache.jsonl")
        teacher.ask([question(str(n)) for n in range(8)])
    assert sorted(waited) == pytest.approx([n / 10 for n in range(8)])


def test_equal_questions_are_asked_once_and_cost_is_counted(tmp_path: Path) -> None:
    prices = {"dollars_per_million_in": 2.0, "dollars_per_million_out": 8.0}
    with Endpoint() as endpoint:
        teacher = ApiTeacher(config(endpoint, **prices), tmp_path / "cache.jsonl")
        assert teacher.ask([question("a"), question("a"), question("b")]) == ["svar: a", "svar: a", "svar: b"]
        cost = 2 * (10 * 2.0 + 3 * 8.0) / 1e6
        assert teacher.usage.dollars(teacher.config) == pytest.approx(cost)
        again = ApiTeacher(config(endpoint, **prices), tmp_path / "cache.jsonl")
        again.ask([question("a")])
        assert again.usage.dollars(again.config) == 0.0
        assert again.total_dollars() == pytest.approx(cost)
        other = ApiTeacher(config(endpoint, temperature=0.5), tmp_path / "cache.jsonl")
        other.ask([question("a")])  # another temperature is another question
    assert endpoint.asked == {"a": 2, "b": 1}
    assert endpoint.keys == {"Bearer a-key-for-tests"}
    assert "a-key-for-tests" not in (tmp_path / "cache.jsonl").read_text()


def test_a_line_that_a_kill_cut_off_costs_that_answer_alone(tmp_path: Path) -> None:
    path = tmp_path / "cache.jsonl"
    first = ReplyCache(path)
    first.put("a", StoredReply("eitt\u2028tvey", 1, 2))
    first.put("b", StoredReply("tvey", 1, 2))
    path.write_bytes(path.read_bytes()[:-9])
    again = ReplyCache(path)
    assert again.get("a") == StoredReply("eitt\u2028tvey", 1, 2)
    assert again.get("b") is None
    again.put("c", StoredReply("trý", 1, 2))
    assert {k: ReplyCache(path).get(k) is not None for k in "abc"} == {"a": True, "b": False, "c": True}


@pytest.mark.parametrize("later", ["room", "no room", "no folder"])
def test_a_cache_that_cannot_be_written_ends_nothing(
    later: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk, or a folder that may not be written to: said once, and written behind that where it can be."""
    path = tmp_path / "api" / "cache.jsonl"
    if later == "no folder":
        (tmp_path / "api").touch()
    cache = ReplyCache(path)
    write = os.write

    def full(handle: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(os, "write", full)
        for key in "ab":
            cache.put(key, StoredReply(key, 1, 2))
    assert [cache.get(key) for key in "ab"] == [StoredReply(key, 1, 2) for key in "ab"]
    assert len(caplog.messages) == 1
    assert "kept in memory alone" in caplog.text
    monkeypatch.setattr(os, "write", write if later == "room" else full)
    cache.put("c", StoredReply("c", 1, 2))
    again = ReplyCache(path)
    assert [key for key in "abc" if again.get(key)] == (list("abc") if later == "room" else [])


def test_half_a_character_is_no_reply() -> None:
    """It could not be written to the cache."""
    with pytest.raises(ValueError, match="malformed reply"):
        parse_completion('{"choices": [{"message": {"content": "\\ud800"}}]}')


def test_killed_in_the_middle_and_started_again(tmp_path: Path) -> None:
    """kill -9 amid 40 questions, of which the endpoint answers 20: all are answered by the second start, and none whose
    answer was on disk is asked twice."""
    log, questions, output = tmp_path / "log", tmp_path / "questions.jsonl", tmp_path / "out" / "warmup.jsonl"
    rows = [{"question": f"spurningur {n}", "id": str(n)} for n in range(40)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "support" / "api_endpoint.py"), str(log)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        ask = [sys.executable, str(ROOT / "training" / "teacher" / "api_teacher.py"), "--questions", str(questions),
               "--output", str(output), "--cache_dir", str(tmp_path / "cache"), "--api.model", "m",
               "--api.base_url", url, "--api.parallel", "8"]  # fmt: skip
        first = subprocess.Popen(ask, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
        stored = tmp_path / "cache" / "api" / "answers.jsonl"
        assert wait_until(lambda: stored.exists() and stored.read_bytes().count(b"\n") == 20, 200)
        first.send_signal(signal.SIGKILL)  # the others are under way, or not asked yet
        first.wait()
        assert not output.exists()
        done = finish_forked(ask)
        answered = Counter(json.loads(line) for line in log.read_text().splitlines())
    finally:
        assert server.stdin is not None
        server.stdin.close()
        server.wait(timeout=100)
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert answers == [row | {"answers": [f"svar: {row['question']}"]} for row in rows]
    assert "40 of 40 answered (20 from the cache)" in done.stdout
    assert answered == {row["question"]: 1 for row in rows}


def test_the_program_reports_what_stays_open_and_says_again(tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "a", "context": "tekstur"}\n{"question": "b"}\n')
    with Endpoint(lambda text, n: "500" if text == "b" else "ok") as endpoint:
        ask = [sys.executable, str(ROOT / "training" / "teacher" / "api_teacher.py"), "--questions", str(questions),
               "--output", str(tmp_path / "out.jsonl"), "--cache_dir", str(tmp_path), "--api.model", "m",
               "--api.base_url", endpoint.url, "--api.attempts", "2"]  # fmt: skip
        done = finish_forked(ask, code=75)
    assert "1 of 2 answered" in done.stdout
    assert "no answer after 2 attempts (status 500)" in done.stderr
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {
        "question": "a", "context": "tekstur", "answers": ["svar: tekstur\n\na"],
    }  # fmt: skip


def test_missing_key_and_model_name_the_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"api.model = None: name the model"):
        ApiTeacher(ApiConfig(), tmp_path / "cache.jsonl")
    monkeypatch.delenv(KEY)
    with pytest.raises(ValueError, match=f"{KEY} is not set"):
        ApiTeacher(ApiConfig(model="m"), tmp_path / "cache.jsonl")


@pytest.mark.parametrize(
    ("reply", "mark"),
    [('{"mark": 7}', 0.7), ('Sure:\n```json\n{"mark": 10, "why": "x"}\n```', 1.0), ('{"mark":0.5}', 0.05)],
)
def test_marks_are_read(reply: str, mark: float) -> None:
    assert parse_mark(reply) == pytest.approx(mark)


@pytest.mark.parametrize(
    "reply", ["7", '{"mark": "7"}', '{"mark": 11}', '{"mark": true}', '{"mark"}', '{"score": 7}', ""]
)
def test_what_is_no_mark_is_refused(reply: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - json's own error or ours
        parse_mark(reply)


def test_a_judge_marks_responses_and_says_where_it_could_not(tmp_path: Path) -> None:
    with Endpoint(lambda text, n: "500" if "ringt" in text else "ok") as endpoint:
        judge = ApiTeacher(config(endpoint, attempts=2), tmp_path / "judge.jsonl")
        assert marks(judge, [("Hvat?", "gott"), ("Hvat?", " "), ("Hvat?", "ringt")]) == [0.7, 0.0, None]
    assert sum(endpoint.asked.values()) == 3  # one, none, two attempts


def test_a_rank_whose_judge_is_slow_gets_on(tmp_path: Path) -> None:
    """Or the watchdog would take it for stuck: with requests_per_minute a step may wait for longer than it does."""
    inputs = RewardInput(
        lengths_B=torch.tensor([1, 1, 1]), finished_B=torch.tensor([True] * 3), behavior_logprobs_S=torch.zeros(3),
        teacher_logprobs_S=torch.zeros(3), texts_B=["eitt", "tvey", "trý"], answers_B=[()] * 3,
        questions_B=["Hvat?"] * 3, group_size=3,
    )  # fmt: skip
    with Endpoint() as endpoint:
        rewards = RewardConfig(judge_weight=1.0, judge=config(endpoint))
        before = distributed.beats()
        configured_parts(inputs, RunConfig(rewards=rewards, cache_dir=str(tmp_path)))
    assert distributed.beats() == before + 3


def test_a_judge_in_a_real_run(tmp_path: Path, train: Callable[..., object]) -> None:
    with Endpoint(lambda text, n: "500" if n == 0 and len(text) % 3 == 0 else "ok") as endpoint:
        options = ["--name", "run", "--eval.questions", "8", "--steps", "1", "--reward", "teacher_logprob",
                   "--rewards.judge_weight", "0.5", "--rewards.judge.model", "m", "--rewards.judge.base_url",
                   endpoint.url]  # fmt: skip
        train(tmp_path, *options)
    row = metrics(tmp_path / "run")[0]
    assert 0.0 < row["reward/judge"] <= 0.7 + 1e-6  # 0.7 where something was written
    assert row["reward/mean"] == pytest.approx(row["reward/teacher_logprob"] + 0.5 * row["reward/judge"], rel=1e-5)
    assert max(endpoint.answered.values()) == 1  # a response that comes twice is judged once


def test_a_run_without_the_key_or_the_dictionary_ends_before_any_model_is_loaded(
    tmp_path: Path, train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY)
    judged = ["--rewards.judge_weight", "1", "--rewards.judge.model", "m"]
    assert f"error: {KEY} is not set" in train(tmp_path, *judged, code=2).stderr
    checked = ["--rewards.language_weight", "1", "--rewards.language_dictionary", "nowhere"]
    message = "error: rewards.language_dictionary = 'nowhere': no such Hunspell dictionary"
    assert message in train(tmp_path, *checked, code=2).stderr
    unknown = train(tmp_path, "--rewards.similarity_metric", "meteor", code=2).stderr
    assert all(name in unknown for name in ("rouge_l", "chrf", "bleu", "exact_match", "token_f1", "edit"))
