"""Stages 0 and 1 end as stage 2 does: the same exit codes, limits and reasons."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from configs.schema import EvalConfig, RunConfig, TeacherConfig
from tests.support.experiences import prompts_of
from tests.support.forked import finish_forked
from tests.support.runs import ROOT, TINY, metrics
from tests.support.teacher_models import save_tokenizer
from tests.support.teacher_servers import SECRET
from training import distributed, supervised
from training.experience import Prompt
from training.supervised import teacher_answers


def line(runs: Path, cache: Path, *arguments: str) -> list[str]:
    """Stage 1 on the tiny demo."""
    folders = ["--runs_dir", str(runs), "--cache_dir", str(cache)]
    return [sys.executable, str(ROOT / "training" / "sft.py"), *TINY, *folders, "--sft.answers", "data", *arguments]


def end_of(run: Path) -> tuple[int, str]:
    """Exit code and reason of the last start."""
    row = json.loads((run / "starts.jsonl").read_text().splitlines()[-1])
    return row["exit_code"], row["reason"]


@pytest.mark.parametrize("stage", ["sft", "pretrain"])
def test_updates_that_are_all_left_out_end_it(stage: str, tmp_path: Path, demo_cache: Path) -> None:
    """Or it would export the student that it was given, as one that has learnt."""
    ruinous = ["--sft.learning_rate", "1e30", "--actor.max_skipped", "2", "--sft.steps", "40"]
    command = line(tmp_path, demo_cache, *ruinous)
    command[1] = str(ROOT / "training" / f"{stage}.py")
    done = finish_forked(command, code=1)
    assert "2 updates in a row had a non-finite loss" in done.stderr
    assert "Traceback" not in done.stderr
    assert [row["skipped"] for row in metrics(tmp_path / stage)][-3:] == [0, 1, 1]
    assert end_of(tmp_path / stage)[0] == 1
    assert not (tmp_path / stage / "export").exists()
    assert not (tmp_path / stage / "in_use.json").exists()


def test_the_end_of_the_time_is_one_to_start_again_from(tmp_path: Path, demo_cache: Path) -> None:
    done = finish_forked(line(tmp_path, demo_cache, "--sft.steps", "1000000", "--time_limit_s", "30"), code=75)
    assert end_of(tmp_path / "sft") == (75, "time limit"), done.stderr
    steps = len(metrics(tmp_path / "sft"))
    assert (tmp_path / "sft" / "checkpoints" / "latest").read_text() == f"step-{steps:06d}"


def test_a_teacher_that_cannot_be_reached_is_one_to_start_again_with(tmp_path: Path, demo_cache: Path) -> None:
    nobody = ["--sft.answers", "teacher", "--teacher.address", "127.0.0.1:1", "--teacher.timeout_s", "2"]
    done = finish_forked(line(tmp_path, demo_cache, *nobody), code=75, GRPO_KD_TEACHER_SECRET=SECRET)
    assert "no teacher at 127.0.0.1:1 for 2 s" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_finished_one_is_not_done_again(tmp_path: Path, demo_cache: Path) -> None:
    """Its export may be what a stage 2 has started from, which goes on with just that."""
    once = line(tmp_path, demo_cache, "--sft.steps", "2")
    finish_forked(once)
    export = tmp_path / "sft" / "export" / "model.safetensors"
    before = export.stat()
    assert "was finished already" in finish_forked(once).stdout
    assert (export.stat().st_ino, export.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    finish_forked([*once, "--sft.output", str(tmp_path / "elsewhere")])
    assert (tmp_path / "elsewhere" / "model.safetensors").is_file()
    finish_forked([*once, "--sft.steps", "3"])
    assert len(metrics(tmp_path / "sft")) == 3


def test_the_student_is_held_against_the_teachers_whole_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in stage 2: of log-probabilities of tokens alone the reverse KL behind stage 1 would be an estimate."""
    for name, fake in (
        ("connect", lambda teacher, place, facts, stack, head=None: SimpleNamespace(head=head)),
        ("find_teacher", lambda *_: ("", "")),
        ("check_served_model", lambda *_: None),
        ("check_served_room", lambda *_: None),
    ):
        monkeypatch.setattr(supervised, name, fake)
    stage: Any = SimpleNamespace(config=RunConfig(), run=SimpleNamespace(folder=SimpleNamespace(path=Path("run"))))
    facts, head = cast("Any", None), cast("Any", object())
    assert supervised.ask_teacher(stage, facts, ExitStack(), [], head).head is head


def test_rank_0_alone_asks_for_the_teachers_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a large teacher take hours (`distributed.by_main`), and are kept."""
    asked_for: list[str] = []
    model = tmp_path / "teacher"
    model.mkdir()
    save_tokenizer(model)
    ends = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "p1"}
    (model / "tokenizer_config.json").write_text(json.dumps(ends))
    config = RunConfig(
        teacher=TeacherConfig(path=str(model), prompt="plain"), eval=EvalConfig(batch=2), cache_dir=str(tmp_path)
    )
    prompts = [replace(prompt, text=str(n)) for n, prompt in enumerate(prompts_of([(3,)] * 5))]

    def answer(asked: Sequence[Prompt], *_: object, **__: object) -> list[tuple[str, bool]]:
        asked_for.append("".join(prompt.text for prompt in asked))
        return [(f"svar {prompt.text}", True) for prompt in asked]

    link: Any = SimpleNamespace(answer=answer)
    answers = teacher_answers(config, link, prompts)
    assert teacher_answers(config, link, prompts) == answers == [[[f"svar {n}", True]] for n in range(5)]
    assert asked_for == ["01", "23", "4"]

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as context:  # what is kept ends nothing
        context.setattr(supervised, "write_atomically", full)
        assert teacher_answers(replace(config, seed=1), link, prompts) == answers
    asked_for.clear()
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(distributed, "gather_strings", lambda mine: [*map(json.dumps, answers), *mine])
    assert teacher_answers(config, link, prompts) == answers
    assert asked_for == []
