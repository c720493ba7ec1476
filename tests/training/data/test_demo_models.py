"""The demo's models: built once, whole or not there, and the teacher knows what the student does not."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.training.run.test_leaving import wait_until
from training.data.demo import models
from training.data.demo.models import DemoPaths, ensure_demo
from training.run import launcher


def test_the_demo_is_built_once_and_found_again(demo_cache: Path) -> None:
    paths = ensure_demo(demo_cache, size="tiny")
    assert all(Path(path).exists() for path in vars(paths).values())
    before = (paths.teacher / "model.safetensors").stat().st_mtime_ns
    start = time.process_time()
    assert ensure_demo(demo_cache, size="tiny") == paths
    assert time.process_time() - start < 5
    assert (paths.teacher / "model.safetensors").stat().st_mtime_ns == before
    assert ensure_demo(demo_cache, size="tiny").teacher.parent != demo_cache


def ensure_untrained(folder: Path) -> None:
    """`ensure_demo` with a builder that trains nothing, and is not done before two processes have come this far."""

    def build(root: Path, *, seed: int, size: models.Size) -> None:
        (root / f"by-{os.getpid()}").touch()
        assert wait_until(lambda: len([*folder.glob("came-*")]) == 2, 300)

    (folder / f"came-{os.getpid()}").touch()
    with mock.patch.object(models, "build", build):
        ensure_demo(folder / "cache", size="tiny")


def test_processes_that_start_together_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=ensure_untrained, args=(tmp_path,)) for _ in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(400)
        assert worker.exitcode == 0
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert len([*folder.iterdir()]) == 1


def test_the_models_builders_choose_no_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs that look for a free one at the same time may find the same."""
    started: list[tuple[list[str], dict[str, str]]] = []

    def start(line: list[str], env: dict[str, str]) -> SimpleNamespace:
        started.append((line, env))
        return SimpleNamespace(poll=lambda: 0, returncode=0)

    monkeypatch.setattr(models.subprocess, "Popen", start)
    monkeypatch.setenv("MASTER_PORT", "29500")
    models.build(tmp_path, seed=0, size="tiny")
    ranks = [(Path(line[2]).name, line[5], env["RANK"], env["WORLD_SIZE"]) for line, env in started]
    assert [(name, *rank) for name, _, *rank in ranks] == [
        ("teacher", "0", "2"), ("teacher", "1", "2"), ("student-base", "0", "1")
    ]  # fmt: skip
    assert len({meeting for _, meeting, *_ in ranks}) == 2
    assert all("MASTER_PORT" not in env for _, env in started)
    with mock.patch.dict(os.environ):
        os.environ.pop("RANK", None)
        launcher.ensure_launcher_environment()
        assert os.environ["MASTER_PORT"] == "0", "the system chooses as it binds"


def test_student_and_teacher_share_a_tokenizer_that_reads_faroese(demo_cache: Path) -> None:
    paths = ensure_demo(demo_cache, size="tiny")
    tokenizer = AutoTokenizer.from_pretrained(paths.student_base)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(paths.teacher).get_vocab()
    text = "Høvuðsstaðurin eitur Tórshavn, og ý á í ó ú æ ø eru har."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for path in (paths.teacher, paths.student_base):
        config = AutoModelForCausalLM.from_pretrained(path).config
        assert config.eos_token_id == tokenizer.eos_token_id
        assert config.num_attention_heads % 2 == 0


@pytest.mark.slow
def test_the_full_demo_is_quick_and_its_teacher_knows(tmp_path: Path) -> None:
    from configs.io.jsonl import read_questions
    from configs.prompts import as_text, render
    from configs.schema import DataConfig, SamplingConfig
    from rewards.answers import token_f1
    from training.student.loading import load_policy
    from training.student.sampling import Drawing, sample

    start = time.perf_counter()
    paths: DemoPaths = ensure_demo(tmp_path)
    assert time.perf_counter() - start < 360
    rows = read_questions(paths.heldout)
    tokenizer = AutoTokenizer.from_pretrained(paths.teacher)
    prompts = [tuple(tokenizer(as_text(render(row, DataConfig().template)))["input_ids"]) for row in rows]
    config = SamplingConfig(group_size=1, max_new_tokens=12)

    def f1(model: Path) -> float:
        greedy = Drawing(end_tokens=[tokenizer.eos_token_id], generators=None)
        samples = sample(load_policy(model, "float32").eval(), prompts, config, greedy)
        answers = tokenizer.batch_decode([list(r) for r in samples.responses_B], skip_special_tokens=True)
        return 100 * sum(token_f1(a, row["answers"]) for a, row in zip(answers, rows, strict=True)) / len(rows)

    assert f1(paths.teacher) >= 85
    assert f1(paths.student_base) <= 15
