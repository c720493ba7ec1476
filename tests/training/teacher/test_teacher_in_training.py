"""What a run does when its teacher is killed and comes back, and when it answers NaN."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections import Counter
from functools import partial
from pathlib import Path

import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from configs.prompts import Format
from configs.schema import DataConfig
from tests.support.forked import Forked, finish_forked, wait_behind_first_line
from tests.support.runs import command, metrics, timeless
from tests.support.teacher_servers import SECRET, serve_forked, served
from tests.training.run.test_leaving import wait_until
from training.data.order import positions_of_step
from training.data.prompts import load_prompts


def teacher_of(run: Path) -> Path:
    return Path(yaml.safe_load((run / "config.yaml").read_text())["teacher"]["path"])


def test_a_teacher_that_is_killed_and_started_again_changes_no_metric(
    finished_run: Path, tmp_path: Path, demo_cache: Path
) -> None:
    teacher, address, log = teacher_of(finished_run), tmp_path / "teacher.address", tmp_path / "log"
    run = tmp_path / "runs" / "grpo-minillm"
    arguments = ["--steps", "3", "--checkpoint.every", "2", "--teacher.address", str(address)]
    servers = [serve_forked(teacher, address, log)]
    output, rows = tmp_path / "output", run / "metrics.jsonl"
    line, first = command(tmp_path / "runs", demo_cache, *arguments), partial(wait_behind_first_line, rows)
    trainer = Forked(line, output, output, first, GRPO_KD_TEACHER_SECRET=SECRET)
    try:
        assert wait_until(lambda: rows.is_file() and metrics(run), 400), output.read_text()
        servers[0].kill()
        servers[0].wait()
        rows.with_suffix(".go").touch()  # steps 2 and 3 are to come
        time.sleep(2)
        assert trainer.poll() is None
        servers.append(serve_forked(teacher, address, log))
        assert trainer.wait(400) == 0, output.read_text()
    finally:
        trainer.kill()
        trainer.wait()
        for server in servers:
            server.kill()
            server.wait()
    assert f"teacher at {address} was lost" in output.read_text()
    assert timeless(metrics(run)) == timeless(metrics(finished_run))
    ours, undisturbed = (json.loads((path / "summary.json").read_text()) for path in (run, finished_run))
    for key in ("status", "eval_before", "eval_after", "teacher_eval"):
        assert ours[key] == undisturbed[key]


def poison(teacher: Path, token: int) -> None:
    """The embedding of one token becomes NaN; the output layer, tied to it before, stays as it was."""
    (file,) = teacher.glob("*.safetensors")
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.embed_tokens.weight"][token] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))


def test_groups_that_the_teacher_answers_nan_for_are_dropped_counted_and_named(
    finished_run: Path, tmp_path: Path, demo_cache: Path
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(teacher_of(finished_run), teacher)
    config = yaml.safe_load((finished_run / "config.yaml").read_text())
    data = DataConfig(**config["data"])
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    prompts = load_prompts("data.prompts", data, Format(tokenizer), room=10_000, need_answers=False)
    asked = [[prompts[i] for i in positions_of_step(step, 8, len(prompts), config["seed"])] for step in range(2)]
    # A rare token (answers hardly have it) that some prompts of each step have and most do not.
    count = Counter(token for prompt in prompts for token in set(prompt.tokens))
    token = next(
        t for t, _ in reversed(count.most_common()) if all(1 <= sum(t in p.tokens for p in ps) <= 4 for ps in asked)
    )
    expected = [{p.id for p in ps if token in p.tokens} for ps in asked]
    poison(teacher, token)
    options = ("--steps", "2", "--teacher.path", str(teacher), "--reward", "teacher_logprob")
    with served(teacher, tmp_path) as there:
        line = command(tmp_path / "runs", demo_cache, *options, *there)
        done = finish_forked(line, GRPO_KD_TEACHER_SECRET=SECRET)
    rows_of_run = metrics(tmp_path / "runs" / "grpo-teacher_logprob")
    assert len(rows_of_run) == 2
    said = (line for line in done.stderr.splitlines() if "non-finite score" in line)
    named = [set(re.findall(r"'([^']+)'", line)) for line in said]
    print(f"asked with the token: {expected}, dropped: {named}")
    assert [len(ids) for ids in named] == [row["groups/dropped"] for row in rows_of_run]
    for ids, wanted in zip(named, expected, strict=True):
        assert wanted <= ids  # more only where an answer has the token
        assert len(ids) < 8
    for row in rows_of_run:
        assert row["skipped"] == 0
        assert row["grad_norm"] > 0
