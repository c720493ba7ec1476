"""Stage 0: held-out bits a byte fall, the figure is that of a plain forward pass, and the result loads."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from tests.runs import ROOT, finish, metrics
from training.data import text_blocks


def test_stage_0_learns_the_text(tmp_path: Path, demo_cache: Path) -> None:
    arguments = ["--demo_size", "tiny", "--sft.steps", "12", "--sft.batch", "16", "--runs_dir", str(tmp_path)]
    done = finish(
        [sys.executable, str(ROOT / "training" / "pretrain.py"), *arguments, "--cache_dir", str(demo_cache)]
    )  # fmt: skip
    run = tmp_path / "pretrain"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["bits_per_byte_after"] < summary["bits_per_byte_before"] - 0.05
    assert f"{summary['bits_per_byte_after']:.4f} after" in done.stdout
    assert len(metrics(run)) == 12
    # Once more by plain forward passes of the exported model, block by block.
    config = yaml.safe_load((run / "config.yaml").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "export")
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "export").eval()
    end, block = tokenizer.eos_token_id, config["data"]["text_block_tokens"]
    held = text_blocks(config["data"]["text"], tokenizer, end, block)[19::20]
    assert len(held) == summary["held_out_blocks"]
    nats, size = 0.0, 0
    with torch.no_grad():
        for group in held:
            ids = torch.tensor([[*group.prompt, *group.responses[0]]])
            nats += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
            size += len(tokenizer.decode(group.responses[0], skip_special_tokens=True).encode())
    assert summary["bits_per_byte_after"] == pytest.approx(nats / math.log(2) / size, rel=1e-3)


def test_too_little_text_is_said(tmp_path: Path, demo_cache: Path) -> None:
    (tmp_path / "text.txt").write_text("Ein stuttur tekstur.\n", encoding="utf-8")
    arguments = ["--demo_size", "tiny", "--data.text", str(tmp_path / "text.txt"), "--cache_dir", str(demo_cache)]
    done = finish([sys.executable, str(ROOT / "training" / "pretrain.py"), *arguments], code=2)
    assert "20 are needed at least" in done.stderr
