"""What both sides of bench_step.py share: the models, the prompts, the order to run a step, the peak of memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CONFIG = transformers.LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=2048,
    rope_theta=100000.0,
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
"""SmolLM2-135M's shape."""
SHAPES = {"400/32": (400, 32), "32/128": (32, 128), "64/512": (64, 512)}
"""Prompt and response tokens."""
GROUP = 8
KL_COEF = 0.04
JSD_BETA = 0.5
"""Of the divergence of both distillation trainers: beta KL(teacher || m) + (1 - beta) KL(student || m)."""
LEARNING_RATE = 1e-6
BETAS = (0.9, 0.95)
TEMPERATURE = 1.0
_MARK = "@step "


def build_models(folder: Path) -> None:
    """folder/student and folder/teacher: random weights of different seeds, one tokenizer of V words."""
    # A special token is found within words as well: w1 would be cut out of w15.
    special = ["<pad>", "<s>", "</s>"]
    vocabulary = [*special, *(f"w{i}" for i in range(len(special), CONFIG.vocab_size))]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )
    for shape in SHAPES:
        (tokens,) = prompt_tokens(shape, 1, 0)
        assert tuple(tokenizer(prompt_text(tokens))["input_ids"]) == tokens, "TRL would be given another prompt"
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        transformers.LlamaForCausalLM(CONFIG).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def prompt_tokens(shape: str, prompts: int, step: int) -> list[tuple[int, ...]]:
    """The prompts of one step; both sides answer the same ones."""
    stream = torch.Generator().manual_seed(step)
    length = SHAPES[shape][0]
    return [tuple(torch.randint(3, CONFIG.vocab_size, (length,), generator=stream).tolist()) for _ in range(prompts)]


def prompt_text(tokens: tuple[int, ...]) -> str:
    """A text that the tokenizer makes exactly these tokens of."""
    return " ".join(f"w{token}" for token in tokens)


def peak_gb(pid: int | str = "self") -> float:
    """Highest resident memory of a process so far, GB (VmHWM)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / 1e9
    raise RuntimeError("no VmHWM: not Linux?")


def report(values: dict[str, Any]) -> None:
    """One line to the benchmark that started this process."""
    print(_MARK + json.dumps(values), flush=True)


def read_report(stream: Any) -> dict[str, Any]:
    """The next line that `report` wrote; what libraries print in between is dropped."""
    for line in stream:
        if line.startswith(_MARK):
            values: dict[str, Any] = json.loads(line.removeprefix(_MARK))
            return values
    raise RuntimeError("a worker ended without a report; its errors are above")


def wait_for_turn() -> None:
    """Sleep until the benchmark says go; leave when it has gone."""
    if not sys.stdin.readline():
        sys.exit(0)
