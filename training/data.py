"""Questions, answers and raw text as tokens; which of them come in which step is a pure function of the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from configs.jsonl import read_questions
from configs.schema import DataConfig
from inference.packing import Group
from training.experience import Prompt


@dataclass(frozen=True)
class Skipped:
    """What did not fit."""

    count: int
    """Prompts longer than data.max_prompt_tokens (or than the model's context)."""
    longest: int
    """Tokens of the longest of them."""


def render(row: dict[str, Any], config: DataConfig) -> str:
    """The prompt text of a question row."""
    template = config.context_template if row.get("context") else config.template
    return template.replace("{context}", row.get("context") or "").replace("{question}", row["question"])


def load_prompts(
    path: str | Path, config: DataConfig, tokenizer: Any, *, key: str, room: int, need_answers: bool
) -> tuple[list[Prompt], Skipped]:
    """All questions of a file that fit into `room` tokens (and data.max_prompt_tokens).

    Raises ValueError for a malformed file, and where no question fits.
    """
    rows = read_questions(path, answers=need_answers)
    limit = min(config.max_prompt_tokens, room)
    prompts: list[Prompt] = []
    too_long: list[int] = []
    for row in rows:
        text = render(row, config)
        tokens = chat_tokens(tokenizer, text) if config.use_chat_template else tuple(tokenizer(text)["input_ids"])
        if len(tokens) > limit or not tokens:
            too_long.append(len(tokens))
            continue
        prompts.append(
            Prompt(
                index=len(prompts), text=text, tokens=tokens, answers=tuple(row.get("answers") or ()),
                question=row["question"], context=row.get("context"), id=str(row.get("id", len(prompts))),
                chat=config.use_chat_template, question_en=row.get("question_en"), context_en=row.get("context_en"),
            )
        )  # fmt: skip
    if not prompts:
        raise ValueError(
            f"{key} = {str(path)!r}: all {len(rows)} prompts are longer than {limit} tokens (the longest has "
            f"{max(too_long)}); raise data.max_prompt_tokens, or use a model with a longer context"
        )
    return prompts, Skipped(count=len(too_long), longest=max(too_long, default=0))


def chat_tokens(tokenizer: Any, message: str) -> tuple[int, ...]:
    """A user's message in the tokenizer's own chat template, up to where the answer begins."""
    messages = [{"role": "user", "content": message}]
    return tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False))


def answer_lead(prompt: Prompt) -> str:
    """What stands between a prompt and its answer: the templates end in a colon, a chat template where text begins."""
    return "" if prompt.chat else " "


def random_stream(*numbers: int) -> torch.Generator:
    """A generator that belongs to these numbers (seed, step, prompt, ...), whoever draws from it, and when."""
    mixed = 0
    for number in numbers:
        # splitmix64: neighbouring seeds, steps and prompts give unrelated streams.
        mixed = (mixed + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return torch.Generator().manual_seed(mixed & 0x7FFFFFFFFFFFFFFF)


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) & 0x7FFFFFFFFFFFFFFF)
    return torch.randperm(size, generator=generator)


def positions_of_step(step: int, count: int, size: int, seed: int) -> list[int]:
    """The `count` items that step `step` takes from `size` items, shuffled anew each epoch; no item is left out.

    A pure function, so resuming needs no cursor and skips nothing at an epoch's end.
    """
    return [int(_permutation(seed, i // size, size)[i % size]) for i in range(step * count, (step + 1) * count)]


def replacement_positions(slots: Sequence[int], size: int, seed: int, step: int, attempt: int) -> list[int]:
    """An item for each slot of a step whose own item taught nothing; `attempt` counts the tries. Drawn by slot, so that
    the number of ranks changes nothing."""
    return [int(torch.randint(size, (1,), generator=random_stream(seed, step, attempt, slot))) for slot in slots]


def share_of_rank(items: Sequence[Any], rank: int, world: int) -> list[Any]:
    """This rank's contiguous share; shares differ by at most one item."""
    start, end = len(items) * rank // world, len(items) * (rank + 1) // world
    return list(items[start:end])


def answer_group(prompt: Prompt, answer: str, tokenizer: Any, end_token: int) -> Group:
    """A prompt with one answer to imitate: ` answer` (without the space in a chat) and the end symbol."""
    text = answer_lead(prompt) + answer.strip()
    if text.startswith(" ") and _adds_a_space(tokenizer):
        text = text[1:]  # the tokenizer's own space, or the answer would have two
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    return Group(prompt=prompt.tokens, responses=((*tokens, end_token),))


def _adds_a_space(tokenizer: Any) -> bool:
    """Llama-2's and Mistral's tokenizers put a space in front of every text."""
    first = tokenizer("a", add_special_tokens=False)["input_ids"][:1]
    return any(
        piece.startswith(("\N{LOWER ONE EIGHTH BLOCK}", "Ġ")) for piece in tokenizer.convert_ids_to_tokens(first)
    )
