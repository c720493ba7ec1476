"""Stage 0: held-out bits a byte fall, the figure is that of a plain forward pass, the result loads, a stop costs
nothing."""

from __future__ import annotations

import json
import math
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from configs.prompts import Format
from configs.schema import DataConfig
from tests.support.forked import Forked, finish_forked, wait_behind_first_line
from tests.support.runs import ROOT, finish, metrics, timeless
from tests.training.run.test_leaving import wait_until
from training.data.text import text_blocks


def line(runs: Path, cache: Path, steps: int) -> list[str]:
    """Stage 0 on the tiny demo."""
    return [
        sys.executable, str(ROOT / "training" / "pretrain.py"), "--demo_size", "tiny", "--sft.steps", str(steps),
        "--sft.batch", "16", "--threads", "1", "--runs_dir", str(runs), "--cache_dir", str(cache),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, demo_cache: Path) -> Path:
    """Twelve steps."""
    runs = tmp_path_factory.mktemp("pretrain")
    done = finish(line(runs, demo_cache, 12))
    summary = json.loads((runs / "pretrain" / "summary.json").read_text())
    assert f"{summary['bits_per_byte_after']:.4f} after" in done.stdout
    return runs / "pretrain"


def test_stage_0_learns_the_text(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["bits_per_byte_after"] < summary["bits_per_byte_before"] - 0.05
    assert len(metrics(run)) == 12
    # Once more by plain forward passes of the exported model, block by block.
    config = yaml.safe_load((run / "config.yaml").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "export")
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "export").eval()
    held = list(text_blocks(DataConfig(**config["data"]), Format(tokenizer), run.parent))[19::20]
    assert len(held) == summary["held_out_blocks"]
    nats, size = 0.0, 0
    with torch.no_grad():
        for (group,) in held:
            ids = torch.tensor([[*group.prompt, *group.responses[0]]])
            nats += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
            # A byte-level tokenizer has a letter for each byte, and a block may begin or end inside a character.
            words = tokenizer.convert_ids_to_tokens(list(group.responses[0]))
            size += sum(len(word) for word in words if word not in tokenizer.all_special_tokens)
    assert summary["bits_per_byte_after"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_a_stopped_stage_0_goes_on_and_equals_an_unbroken_one(run: Path, tmp_path: Path, demo_cache: Path) -> None:
    """SIGTERM behind the first step: a checkpoint and exit code 75; the same command again finishes it, bit for bit."""
    other = tmp_path / "pretrain"
    rows, log = other / "metrics.jsonl", tmp_path / "log"
    process = Forked(line(tmp_path, demo_cache, 12), log, log, partial(wait_behind_first_line, rows))
    try:
        assert wait_until(lambda: rows.is_file() and metrics(other), 400), log.read_text()
        process.send_signal(signal.SIGTERM)
        rows.with_suffix(".go").touch()
        assert process.wait(timeout=200) == 75
    finally:
        process.kill()
        process.wait()
    assert len(metrics(other)) == 1
    assert (other / "checkpoints" / "latest").read_text() == "step-000001"
    finish_forked(line(tmp_path, demo_cache, 12))
    assert [row["step"] for row in metrics(other)] == list(range(1, 13))
    assert timeless(metrics(other)) == timeless(metrics(run))
    summaries = [json.loads((one / "summary.json").read_text()) for one in (other, run)]
    assert timeless(summaries[:1]) == timeless(summaries[1:])
    ours, theirs = (load_file(path / "export" / "model.safetensors") for path in (other, run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_too_little_text_is_said(tmp_path: Path, demo_cache: Path) -> None:
    (tmp_path / "text.txt").write_text("Ein stuttur tekstur.\n", encoding="utf-8")
    arguments = ["--demo_size", "tiny", "--data.text", str(tmp_path / "text.txt"), "--cache_dir", str(demo_cache)]
    done = finish_forked([sys.executable, str(ROOT / "training" / "pretrain.py"), *arguments], code=2)
    assert "20 are needed at least" in done.stderr
