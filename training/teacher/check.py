"""Is this teacher worth listening to? At the start of stage 2, teacher and student judge the same minimal pairs.

`eval.minimal_pairs` sentences of the raw text, or of the held-out questions' contexts, are set beside the same with
one mistake (rewards/minimal_pairs.py). A teacher whose likelihood does not tell them apart better than the student's
cannot teach Faroese through that likelihood: one line of warning says so. The student answers through its training
forward, the teacher through its server, as they do for the reward; but both read plain text, a chat model too: the
second half of a sentence answers no question.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from configs.io.jsonl import read_jsonl
from configs.io.results import Result, Value, versions
from configs.prompts import Format
from configs.schema import RunConfig
from rewards.minimal_pairs import (
    Pair,
    accuracy_difference,
    behind_first_word,
    make_pairs,
    score_pairs,
    wins_of,
)
from rewards.tokens import sum_by_response
from training.experience import Prompt, Rollout
from training.student.actor import Actor
from training.teacher.link import TeacherLink

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


def teacher_check(actor: Actor, link: TeacherLink, config: RunConfig, heldout: Sequence[Prompt]) -> Result:
    """Both models on the same pairs, read as plain text: values as `score_pairs` has them, student/ and teacher/ before
    their names, and the `difference` in accuracy; none where there is no pair. Collective; every rank judges all."""
    pairs = make_pairs(sentences(config, heldout), config.eval.minimal_pairs, config.seed)
    facts = link.facts
    ours, theirs = (replace(one, kind="plain", parsed="") for one in (facts.student, facts.teacher))
    facts = replace(facts, student=ours, teacher=theirs)
    link = TeacherLink(link.client, facts, None)
    rooms = (facts.student, config.data.max_prompt_tokens), (facts.teacher, link.client.info().max_positions)
    pairs = [pair for pair in pairs if all(_fits(pair, one.tokenizer, room) for one, room in rooms)]
    logprobs: dict[str, list[float]] = {"student": [], "teacher": []}
    for begin in range(0, len(pairs), BATCH):
        rollout = as_rollout(facts.student, pairs[begin : begin + BATCH])
        asked = link.ask(rollout, whole_distribution=False)
        logprobs_S = {"student": actor.logprobs(rollout, temperature=1.0), "teacher": asked().logprobs_S}
        for name, found_S in logprobs_S.items():
            logprobs[name] += sum_by_response(found_S.double(), rollout.lengths_B).tolist()
    values: dict[str, Value] = {}
    if pairs:
        for name, found in logprobs.items():
            scores = score_pairs(pairs, found[0::2], found[1::2])
            values |= {f"{name}/{key}": Value(*one) for key, one in scores.items()}
        wins = {name: wins_of(found[0::2], found[1::2]) for name, found in logprobs.items()}
        values["difference"] = Value(*accuracy_difference(wins["teacher"], wins["student"]))
    return Result(
        measure="teacher_check",
        model=config.student.path,
        data={"path": config.data.text or config.data.heldout, "rows": len(pairs)},
        settings={"teacher": config.teacher.path, "seed": config.seed},
        versions=versions("torch", "transformers"),
        values=values,
    )


def warning(found: Result) -> str | None:
    """What to say of a `teacher_check`, or None where the teacher is the better judge."""
    if not found.values:
        return "eval.minimal_pairs: no sentence of 4 to 40 words to make pairs of; teacher and student are not compared"
    difference = found.values["difference"]
    low, high = 100 * (difference.low or 0.0), 100 * (difference.high or 0.0)
    if low > 0:
        return None
    teacher, student = (100 * found.values[f"{name}/accuracy"].value for name in ("teacher", "student"))
    better = "not clearly a better" if teacher > student else "no better"
    return (
        f"the teacher is {better} judge of Faroese than the student: it prefers the right sentence in {teacher:.1f} % "
        f"of {found.data['rows']} pairs, the student in {student:.1f} % (difference {low:+.1f} to {high:+.1f}); its "
        "likelihood may teach facts, but hardly grammar"
    )


def as_rollout(plain: Format, pairs: Sequence[Pair]) -> Rollout:
    """Each pair as a group of two responses, right and wrong, to the sentence's first word, in the student's tokens."""
    prompts: list[Prompt] = []
    responses: list[tuple[int, ...]] = []
    texts: list[str] = []
    for index, pair in enumerate(pairs):
        first = pair.right.split(maxsplit=1)[0]
        prompts.append(Prompt(index=index, text=first, tokens=plain.prompt(first), answers=(), question=first))
        for sentence in (pair.right, pair.wrong):
            texts.append(behind_first_word(sentence).strip())
            responses.append(plain.answer(texts[-1]))
    return Rollout(
        prompts_N=prompts,
        group_size=2,
        responses_B=responses,
        finished_B=torch.zeros(len(responses), dtype=torch.bool),
        texts_B=texts,
        behavior_logprobs_S=torch.zeros(sum(map(len, responses))),
        sampled_logprobs_S=torch.zeros(sum(map(len, responses))),
    )


def _fits(pair: Pair, tokenizer: Any, room: int) -> bool:
    return max(len(tokenizer(text)["input_ids"]) for text in (pair.right, pair.wrong)) < room
