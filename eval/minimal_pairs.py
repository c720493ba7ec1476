"""Does a model know right Faroese from wrong? Pairs of a sentence and the same with one mistake; which is likelier?

    python eval/minimal_pairs.py --model DIR [DIR2 ...] --text heldout.jsonl

The mistakes are made by rule (rewards/minimal_pairs.py), the same for every model and for the same --seed. Chance is
50 %. A whole sentence is compared with a whole one; `per char` compares the log-probability of a character, because a
sentence with a word left out is the likelier one by its length alone. `r` is the correlation of that with right and
wrong: what a teacher's likelihood, taken as a reward, carries of grammar. With several models the difference of each
one's accuracy to the first one's follows, with its interval. Each model's win on each pair is kept in pairs.json beside
its other evaluations, for eval/compare.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if not __package__:  # started as a script: our rooms first, and no file of this folder hides a library
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from configs.files import write_atomically
from configs.schema import RunConfig
from eval.model_dirs import output_folder
from eval.perplexity import Encoded, encode, load_model, read_texts
from rewards.minimal_pairs import (
    KINDS,
    Pair,
    PairScores,
    difference_interval,
    make_pairs,
    score_pairs,
    sentences_of,
    wins_of,
)


@torch.inference_mode()
def sentence_logprobs(model: Any, tokenizer: Any, sentences: Sequence[str], batch: int = 32) -> list[float]:
    """log p(all behind the first word | first word) of each sentence, nats."""
    encoded = [encode(sentence, tokenizer) for sentence in sentences]
    found = [0.0] * len(sentences)
    order = sorted((i for i, one in enumerate(encoded) if one is not None), key=lambda i: len(_some(encoded[i]).ids))
    for begin in range(0, len(order), batch):
        chunk = order[begin : begin + batch]
        ids = torch.zeros(len(chunk), len(_some(encoded[chunk[-1]]).ids), dtype=torch.int64)
        lengths = torch.tensor([len(_some(encoded[i]).ids) for i in chunk])
        for row, i in enumerate(chunk):  # padded on the right: a causal model does not see what follows
            ids[row, : lengths[row]] = torch.tensor(_some(encoded[i]).ids)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
        logprobs = logits[:, :-1].float().log_softmax(-1).cpu().gather(-1, ids[:, 1:, None])[..., 0].double()
        for row, i in enumerate(chunk):
            found[i] = float(logprobs[row, _some(encoded[i]).scored - 1 : int(lengths[row]) - 1].sum())
    return found


def _some(encoded: Encoded | None) -> Encoded:
    assert encoded is not None
    return encoded


def judge(model: Any, tokenizer: Any, pairs: Sequence[Pair], batch: int = 32) -> tuple[PairScores, list[float]]:
    """(what the model says of the pairs, its win on each pair)."""
    values = sentence_logprobs(model, tokenizer, sentences_of(pairs), batch)
    right, wrong = values[: len(pairs)], values[len(pairs) :]
    return score_pairs(pairs, right, wrong), wins_of(right, wrong)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line that says what to mend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, nargs="+", action="extend", help="Hugging Face model directories")
    parser.add_argument("--text", type=Path, required=True, help="right sentences: JSONL with `text`, or one a line")
    parser.add_argument("--pairs", type=int, default=1000, help="pairs, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the mistakes")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch", type=int, default=32, help="sentences in a forward pass")
    parser.add_argument("--json", type=Path, help="write the numbers and the pairs here as well")
    parser.add_argument("--runs_dir", type=Path, default=Path(RunConfig().runs_dir), help="folder of all runs")
    options = parser.parse_args(arguments)
    results: dict[str, tuple[PairScores, list[float]]] = {}
    try:
        pairs = make_pairs(read_texts(options.text), options.pairs, options.seed)
        if not pairs:
            raise ValueError(f"{options.text}: no sentence of 4 to 40 words that a mistake can be made in")
        for path in options.model:
            results[path] = judge(*load_model(path, options.dtype), pairs, options.batch)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _print(results, len(pairs))
    digest = hashlib.sha256(json.dumps([asdict(pair) for pair in pairs]).encode()).hexdigest()
    for path, (scores, wins) in results.items():
        own = {"model": path, "text": str(options.text), "sha256": digest, **asdict(scores), "wins": wins}
        write_atomically(
            output_folder(path, options.runs_dir) / "pairs.json", json.dumps(own, ensure_ascii=False) + "\n"
        )
    if options.json is not None:
        content = {
            "text": str(options.text),
            "seed": options.seed,
            "models": {path: asdict(scores) for path, (scores, _) in results.items()},
            "pairs": [asdict(pair) for pair in pairs],
        }
        write_atomically(options.json, json.dumps(content, ensure_ascii=False, indent=2) + "\n")
    return 0


def _print(results: dict[str, tuple[PairScores, list[float]]], count: int) -> None:
    kinds = "".join(f"{kind:>10}" for kind in KINDS)
    print(f"{count} pairs; accuracy in percent")
    print(f"{'accuracy':>9}{'95 %':>15}{kinds}{'per char':>10}{'bits/char':>11}{'r':>8}  model")
    for path, (scores, _) in results.items():
        interval = f"{100 * scores.low:.1f} to {100 * scores.high:.1f}"
        by_kind = "".join(
            f"{100 * scores.accuracy_by_kind[kind]:10.1f}" if kind in scores.accuracy_by_kind else f"{'-':>10}"
            for kind in KINDS
        )
        last = f"{100 * scores.accuracy_per_character:10.1f}"
        last += f"{scores.bits_per_character:11.4f}{scores.correlation:8.3f}"
        print(f"{100 * scores.accuracy:9.1f}{interval:>15}{by_kind}{last}  {path}")
    first, *others = results
    for other in others:
        low, high = difference_interval(results[other][1], results[first][1])
        print(f"{other} minus {first}: {100 * low:+.1f} to {100 * high:+.1f} points (95 %, same pairs)")


if __name__ == "__main__":
    sys.exit(main())
