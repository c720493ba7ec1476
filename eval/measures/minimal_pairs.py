"""Does a model know right Faroese from wrong? Pairs of a sentence and the same with one mistake; which is likelier?

    python eval/measure.py minimal_pairs --model DIR [DIR2 ...] --text heldout.jsonl

The mistakes are made by rule (rewards/minimal_pairs.py), the same for every model and for the same --seed. Chance is
50 %. A whole sentence is compared with a whole one; `accuracy_per_character` compares the log-probability of a
character, because a sentence with a word left out is the likelier one by its length alone. `correlation` is that of
the latter with right and wrong: what a teacher's likelihood, taken as a reward, carries of grammar.

Result (pairs.json; a run's minimal_pairs.json is of student and teacher before its first step): values accuracy
(Wilson's interval), accuracy/KIND, accuracy_per_character (all 0 to 1), bits_per_character, correlation; rows {id,
kind, right, wrong, win, right_logprob, wrong_logprob}, in nats.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from configs.io.jsonl import read_texts
from configs.io.results import Result, Value, versions
from configs.ranges import PositiveInt
from eval.measures.model import Model
from eval.measures.perplexity import score_texts
from rewards.minimal_pairs import make_pairs, score_pairs, sentences_of, wins_of


@dataclass(frozen=True, kw_only=True)
class PairSettings:
    """Which pairs."""

    text: Path
    """Right sentences: JSONL with `text`, or one in each line."""
    pairs: PositiveInt = 1000
    """Number of pairs, at most."""
    seed: int = 0
    """Seed of the mistakes."""
    batch: PositiveInt = 32
    """Sentences in a forward pass."""


def minimal_pairs(model: Model, settings: PairSettings) -> Result:
    """The model's accuracy. Raises ValueError where the text has no sentence to make a pair of."""
    pairs = make_pairs(read_texts(settings.text), settings.pairs, settings.seed)
    if not pairs:
        raise ValueError(f"{settings.text}: no sentence of 4 to 40 words that a mistake can be made in")
    found = score_texts(model.network, model.tokenizer, sentences_of(pairs), settings.batch)
    # What is scored lies behind the first word; where a tokenizer finds nothing there, nothing was said of it.
    logprobs = [0.0 if one is None else -one.nats for one in found]
    right, wrong = logprobs[: len(pairs)], logprobs[len(pairs) :]
    return Result(
        measure="minimal_pairs",
        model=model.path,
        data={
            "path": str(settings.text),
            "sha256": hashlib.sha256(json.dumps([asdict(pair) for pair in pairs]).encode()).hexdigest(),  # of the pairs
            "rows": len(pairs),
        },
        settings={"dtype": model.dtype, "seed": settings.seed},
        versions=versions("torch", "transformers"),
        values={name: Value(*one) for name, one in score_pairs(pairs, right, wrong).items()},
        rows=[
            {"id": str(place), **asdict(pair), "win": win, "right_logprob": r, "wrong_logprob": w}
            for place, (pair, win, r, w) in enumerate(zip(pairs, wins_of(right, wrong), right, wrong, strict=True))
        ],
    )
