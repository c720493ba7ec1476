"""Is this teacher worth listening to? At the start of stage 2, teacher and student judge the same minimal pairs.

`eval.minimal_pairs` sentences of the raw text, or of the held-out questions' contexts, are set beside the same with
one mistake (rewards/minimal_pairs.py). A teacher whose likelihood does not tell them apart better than the student's
cannot teach Faroese through that likelihood: one line of warning says so. The student answers through its training
forward, the teacher through its server, as they do for the reward.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from configs.jsonl import read_jsonl
from configs.schema import RunConfig
from inference.packing import pack, scatter_responses
from rewards.minimal_pairs import (
    Pair,
    behind_first_word,
    difference_interval,
    make_pairs,
    score_pairs,
    wins_of,
)
from training.actor import Actor
from training.deepspeed_engine import in_step
from training.experience import Prompt, Rollout
from training.teaching import TeacherLink

BATCH = 32
"""Pairs judged at a time."""


def sentences(config: RunConfig, heldout: Sequence[Prompt]) -> list[str]:
    """Right sentences: of the raw text where there is some, else of the held-out questions' contexts. Text that the
    student is trained on serves here, because both models are asked before the first step."""
    if config.data.text is not None:
        texts = [str(row["text"]) for row in read_jsonl(config.data.text, ["text"])]
    else:
        texts = [prompt.context for prompt in heldout if prompt.context]
    return split_sentences(texts)


def split_sentences(texts: Sequence[str]) -> list[str]:
    """What ends in a full stop, question mark or exclamation mark before white space."""
    parts = [part.strip() for text in texts for part in re.split(r"(?<=[.!?])\s+", text)]
    return [part for part in parts if part]


def teacher_check(actor: Actor, link: TeacherLink, config: RunConfig, heldout: Sequence[Prompt]) -> dict[str, Any]:
    """Both models on the same pairs, as eval/minimal_pairs.json has it. Collective; every rank judges all pairs."""
    pairs = make_pairs(sentences(config, heldout), config.eval.minimal_pairs, config.seed)
    pairs = [pair for pair in pairs if _fits(actor, pair, config.data.max_prompt_tokens)]
    if not pairs:
        return {"pairs": 0}
    values: dict[str, list[float]] = {"student": [], "teacher": []}
    for begin in range(0, len(pairs), BATCH):
        rollout = as_rollout(actor, pairs[begin : begin + BATCH])
        asked = link.ask(rollout, whole_distribution=False)
        values["student"] += _logprobs(actor, rollout, config).double().sum(1).tolist()
        values["teacher"] += asked().logprobs_BR.double().sum(1).tolist()
    scores = {name: score_pairs(pairs, found[0::2], found[1::2]) for name, found in values.items()}
    wins = {name: wins_of(found[0::2], found[1::2]) for name, found in values.items()}
    low, high = difference_interval(wins["teacher"], wins["student"])
    return {
        "pairs": len(pairs),
        "text": config.data.text or config.data.heldout,
        **{name: asdict(found) for name, found in scores.items()},
        "difference": {"low": low, "high": high},
    }


def warning(found: dict[str, Any]) -> str | None:
    """What to say of a `teacher_check`, or None where the teacher is the better judge."""
    if not found["pairs"]:
        return "eval.minimal_pairs: no sentence of 4 to 40 words to make pairs of; teacher and student are not compared"
    if found["difference"]["low"] > 0:
        return None
    teacher, student = (100 * found[name]["accuracy"] for name in ("teacher", "student"))
    low, high = (100 * found["difference"][end] for end in ("low", "high"))
    better = "not clearly a better" if teacher > student else "no better"
    return (
        f"the teacher is {better} judge of Faroese than the student: it prefers the right sentence in {teacher:.1f} % "
        f"of {found['pairs']} pairs, the student in {student:.1f} % (difference {low:+.1f} to {high:+.1f}); its "
        "likelihood may teach facts, but hardly grammar"
    )


def as_rollout(actor: Actor, pairs: Sequence[Pair]) -> Rollout:
    """Each pair as a group of two responses, right and wrong, to the sentence's first word."""
    prompts: list[Prompt] = []
    responses: list[tuple[int, ...]] = []
    texts: list[str] = []
    for index, pair in enumerate(pairs):
        first = pair.right.split(maxsplit=1)[0]
        tokens = tuple(actor.tokenizer(first)["input_ids"])
        prompts.append(Prompt(index=index, text=first, tokens=tokens, answers=(), question=first))
        for sentence in (pair.right, pair.wrong):
            texts.append(behind_first_word(sentence).strip())
            responses.append(tuple(actor.tokenizer(" " + texts[-1], add_special_tokens=False)["input_ids"]))
    blank_BR = torch.zeros(len(responses), max(map(len, responses)))
    unfinished_B = torch.zeros(len(responses), dtype=torch.bool)
    return Rollout(prompts, 2, responses, unfinished_B, blank_BR, blank_BR, texts)


@torch.no_grad()
def _logprobs(actor: Actor, rollout: Rollout, config: RunConfig) -> torch.Tensor:
    """float32 [B, R] log pi at temperature 1. Collective under ZeRO 3."""
    rows = in_step(pack(rollout.groups(), config.actor.micro_batch_tokens))
    values = [actor.policy(row.to(actor.engine.device)).logprobs_S.cpu() for row, _ in rows]
    real = [row for row, used in rows if used]
    return scatter_responses(real, values[: len(real)], *rollout.behavior_logprobs_BR.shape)


def _fits(actor: Actor, pair: Pair, limit: int) -> bool:
    return max(len(actor.tokenizer(text)["input_ids"]) for text in (pair.right, pair.wrong)) < limit
