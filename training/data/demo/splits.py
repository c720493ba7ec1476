"""The embedded demo's splits for EuroEval's four Faroese tasks: toys in its format, so that the real harness runs.

Built from the demo's own frames and names (configs/demo/frames.yaml, CLDR), like its questions:
- foqa: questions on a short text, phrased as the trainer's; `test` in the held-out phrasings with held-out names.
- fone: the demo's sentences, with the names of people (PER) and of countries, capitals and sites (LOC) marked.
- scala-fo: those sentences, half of them with one mistake made by rule (rewards/minimal_pairs.py).
- fosent: a subject and an adjective, good, plain or bad, from configs/demo/sentiment.yaml.

They stand in training/ because they are made of the demo's world, which eval/ may not import; stage 2 writes them
beside the demo's questions, where stage 3 finds them.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from rewards.minimal_pairs import make_pairs
from training.data.demo.sentences import draw_contexts, fill, write_jsonl
from training.data.demo.world import load_frames, word_lists

SENTIMENT_FILE = Path(__file__).resolve().parents[3] / "configs" / "demo" / "sentiment.yaml"
ROWS = {"train": 64, "val": 24, "test": 48}
TAGS = {"names": "PER", "sites": "LOC", "countries": "LOC", "capitals": "LOC"}
Row = dict[str, Any]
Splits = dict[str, list[Row]]


def build_demo_splits(seed: int = 0) -> dict[str, Splits]:
    """Rows by task and split, the same for the same seed; no row occurs in two splits of a task."""
    sentences = tagged_sentences(seed)
    return {
        "foqa": questions(seed),
        "fone": deal(sentences, f"{seed}-fone"),
        "scala-fo": acceptability([sentence(row["tokens"]) for row in sentences], seed),
        "fosent": deal(sentiments(), f"{seed}-fosent"),
    }


def deal(rows: Sequence[Row], seed: str) -> Splits:
    """The rows shuffled and dealt into the splits."""
    shuffled = random.Random(seed).sample(list(rows), len(rows))
    if len(rows) < sum(ROWS.values()):
        raise ValueError(f"{len(rows)} rows for splits of {sum(ROWS.values())}")
    splits, start = {}, 0
    for split, count in ROWS.items():
        splits[split] = shuffled[start : start + count]
        start += count
    return splits


def questions(seed: int) -> Splits:
    """Questions on a text that holds the answer."""
    told = draw_contexts(("warmup", "rl"), ROWS["train"] + ROWS["val"], f"{seed}-euroeval")
    taken = {row.context for row in told}
    unseen = draw_contexts(("heldout",), ROWS["test"], f"{seed}-euroeval-unseen", taken)
    parts = {"train": told[: ROWS["train"]], "val": told[ROWS["train"] :], "test": unseen}

    def row(split: str, index: int, asked: Any) -> Row:
        (answer,), context = asked.answers, asked.context
        answers = {"text": [answer], "answer_start": [context.index(answer)]}
        return {"id": f"{split}-{index:03d}", "context": context, "question": asked.question, "answers": answers}

    return {split: [row(split, index, asked) for index, asked in enumerate(rows)] for split, rows in parts.items()}


def tagged_sentences(seed: int) -> list[Row]:
    """Sentences of the demo with every name in them marked; punctuation is a token of its own."""
    rng, lists = random.Random(f"{seed}-euroeval-sentences"), word_lists()
    found: dict[str, Row] = {}
    for frame in load_frames()["text"]:
        if frame["list"] not in TAGS:
            continue
        for word in lists[frame["list"]]:
            other = rng.choice([one for one in lists[frame["list"]] if one != word])
            text = fill(frame["text"], s=word, t=other)
            tokens = text.replace(",", " ,").replace(".", " .").split()
            found[text] = {"tokens": tokens, "labels": mark(tokens, (word, other), TAGS[frame["list"]])}
    return list(found.values())


def mark(tokens: Sequence[str], names: Iterable[str], tag: str) -> list[str]:
    """One label a token: B- and I- of `tag` where one of the names stands, else O."""
    labels = ["O"] * len(tokens)
    for name in names:
        words = name.split()
        for start in range(len(tokens) - len(words) + 1):
            if list(tokens[start : start + len(words)]) == words:
                labels[start : start + len(words)] = [f"B-{tag}", *[f"I-{tag}"] * (len(words) - 1)]
    return labels


def sentence(tokens: Sequence[str]) -> str:
    """The tokens as one would write them."""
    return " ".join(tokens).replace(" ,", ",").replace(" .", ".")


def acceptability(sentences: Sequence[str], seed: int) -> Splits:
    """Every sentence once, right or with one mistake, as many of each."""
    pairs = make_pairs(sentences, sum(ROWS.values()), seed)
    splits = deal([{"right": pair.right, "wrong": pair.wrong} for pair in pairs], f"{seed}-scala")
    return {
        split: [
            {"text": row["wrong"], "label": "incorrect"} if index % 2 else {"text": row["right"], "label": "correct"}
            for index, row in enumerate(rows)
        ]
        for split, rows in splits.items()
    }


def sentiments() -> list[Row]:
    """Every subject with every adjective."""
    words = yaml.safe_load(SENTIMENT_FILE.read_text(encoding="utf-8"))
    return [
        {"text": fill(frame, subject=subject, adjective=adjective), "label": label}
        for frame in words["frames"]
        for subject in words["subjects"]
        for label in ("positive", "neutral", "negative")
        for adjective in words[label]
    ]


def write_demo_splits(directory: Path, seed: int = 0) -> None:
    """Write DIRECTORY/TASK/SPLIT.jsonl."""
    for task, splits in build_demo_splits(seed).items():
        for split, rows in splits.items():
            write_jsonl(directory / task / f"{split}.jsonl", rows)
