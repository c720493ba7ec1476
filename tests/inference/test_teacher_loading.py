"""Loading: a rank reads its own slices and needs little more memory than they take."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
import transformers

from tests.support.runs import ROOT, free_port

SIZE = 2


def test_peak_memory_of_a_rank_is_under_one_and_a_quarter_of_its_shard(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=8000,
        hidden_size=768,
        intermediate_size=2304,
        num_hidden_layers=10,
        num_attention_heads=12,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    assert total > 300e6
    model.save_pretrained(tmp_path, max_shard_size="80MB")
    del model
    assert len(list(tmp_path.glob("*.safetensors"))) >= 4
    command = [sys.executable, str(ROOT / "tests" / "support" / "teacher_loading.py")]
    port = free_port()
    ranks = [
        subprocess.Popen([*command, str(rank), str(SIZE), port, str(tmp_path)], stdout=subprocess.PIPE)
        for rank in range(SIZE)
    ]
    try:
        for rank in ranks:
            out, _ = rank.communicate(timeout=300)
            memory = json.loads(out)
            assert rank.returncode == 0
            assert memory["shard"] < 0.51 * total
            peak = memory["peak"] - memory["before"]
            assert 0.9 * memory["shard"] < peak < 1.25 * memory["shard"], f"{peak / memory['shard']:.2f} of the shard"
            print(f"peak {peak / 2**20:.0f} MiB, {peak / memory['shard']:.3f} of the shard")
    finally:
        for rank in ranks:
            rank.kill()
