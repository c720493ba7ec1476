"""How well a model predicts text, in bits a byte and a character, so that different tokenizers can be compared.

    python eval/perplexity.py --model runs/NAME/export [TEACHER ...] --text fo=faroese.jsonl da=danish.txt en=a.txt

Several languages show drift: what the student gains in Faroese and loses elsewhere, beside the teacher.

The first word of each text is given, and everything behind it is predicted: the same bytes for every tokenizer, with
or without a start token. The end of a text is not scored, because not every tokenizer marks it. `perplexity` is
e to the mean nats of a *token*; it compares models of one tokenizer only. The bits of each text are kept in
perplexity.json beside the model's other evaluations, so that eval/compare.py can pair two models text by text.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if not __package__:  # started as a script: our rooms first, and no file of this folder hides a library
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from configs.files import write_atomically
from configs.jsonl import read_jsonl
from configs.schema import RunConfig
from eval.model_dirs import output_folder


@dataclass(frozen=True)
class TextScore:
    """One text: what was scored of it, and what it cost."""

    nats: float
    tokens: int
    characters: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Means over all scored text."""

    bits_per_byte: float
    """Bits that the model needs for a UTF-8 byte."""
    bits_per_character: float
    """The same for a Unicode character."""
    perplexity: float
    """e to the mean nats a token."""
    tokens: int
    """Tokens scored."""
    bytes: int
    """Bytes scored."""
    texts: int
    """Texts with something to score."""
    skipped: int
    """Texts of a single word."""


@dataclass(frozen=True)
class Encoded:
    """A text as a model reads it; `ids[scored:]` is what lies behind its first word."""

    ids: list[int]
    scored: int
    characters: int
    bytes: int


def read_texts(path: Path) -> list[str]:
    """The `text` of each row of a JSONL file, or each line of another file that is not blank."""
    if path.suffix == ".jsonl":
        return [str(row["text"]).strip() for row in read_jsonl(path, ["text"])]
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a JSONL file with a `text` in each row, or lines of plain text")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    texts = [line for line in lines if line]
    if not texts:
        raise ValueError(f"{path}: the file has no text")
    return texts


def load_model(model_dir: str | Path, dtype: str = "float32") -> tuple[Any, Any]:
    """(model in evaluation mode on its device, tokenizer); ValueError where that cannot be."""
    transformers_logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype), use_safetensors=True)
    except Exception as error:  # half-written files raise nearly anything
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{model_dir}: the model cannot be loaded ({type(error).__name__}: {reason})") from error
    return model.to(device).eval(), tokenizer


def encode(text: str, tokenizer: Any) -> Encoded | None:
    """The text with its first word marked off; None where nothing lies behind that."""
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__}: needs a tokenizer that says where its tokens lie (a fast one)")
    given = len(text.split(maxsplit=1)[0]) if text.split() else 0
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(found["input_ids"]), found["offset_mapping"]
    # A token that begins inside the first word is given, so that no tokenizer predicts a part of it.
    scored = next((index for index, (start, _) in enumerate(offsets) if start >= given), len(ids))
    if scored in (0, len(ids)):
        return None
    rest = text[given:]
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return Encoded(start + ids, len(start) + scored, len(rest), len(rest.encode()))


def windows(encoded: Encoded, longest: int) -> list[tuple[list[int], int]]:
    """(token ids, place of the first one scored) of each forward pass: no more than `longest` tokens, each token
    behind the first window with at least half a window before it."""
    parts = []
    first = encoded.scored
    while first < len(encoded.ids):
        begin = 0 if len(encoded.ids) <= longest or first < longest // 2 else first - longest // 2
        end = min(begin + longest, len(encoded.ids))
        parts.append((encoded.ids[begin:end], first - begin))
        first = end
    return parts


@torch.inference_mode()
def score_texts(
    model: Any, tokenizer: Any, texts: Sequence[str], batch: int = 32, longest: int | None = None
) -> list[TextScore | None]:
    """The model on each text; None for a text of a single word. `batch`: windows in a forward pass. `longest`: tokens
    in one; None: what the model has room for, at most 1,024."""
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1024
    longest = longest or min(room, 1024)
    encoded = [encode(text, tokenizer) for text in texts]
    parts = [(place, *part) for place, one in enumerate(encoded) if one is not None for part in windows(one, longest)]
    parts.sort(key=lambda part: len(part[1]))
    nats, tokens = [0.0] * len(texts), [0] * len(texts)
    for begin in range(0, len(parts), batch):
        chunk = parts[begin : begin + batch]
        ids = torch.zeros(len(chunk), len(chunk[-1][1]), dtype=torch.int64)
        counted = torch.zeros_like(ids, dtype=torch.bool)
        for row, (_, window, first) in enumerate(chunk):  # padded on the right: a causal model does not look ahead
            ids[row, : len(window)] = torch.tensor(window)
            counted[row, first : len(window)] = True
        mask = (torch.arange(ids.shape[1]) < torch.tensor([[len(window)] for _, window, _ in chunk])).long()
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
        logprobs = logits[:, :-1].float().log_softmax(-1).cpu()
        of_next = logprobs.gather(-1, ids[:, 1:, None])[..., 0].double() * counted[:, 1:]
        for (place, _, _), total, count in zip(chunk, of_next.sum(1).tolist(), counted.sum(1).tolist(), strict=True):
            nats[place] -= total
            tokens[place] += count
    return [
        None if one is None else TextScore(nats[place], tokens[place], one.characters, one.bytes)
        for place, one in enumerate(encoded)
    ]


def summarise(scores: Sequence[TextScore | None]) -> Perplexity:
    """Means over all scored text. Raises ValueError where there is none."""
    known = [one for one in scores if one is not None]
    if not known:
        raise ValueError("no text has more than one word: there is nothing to predict")
    nats, tokens, size = sum(one.nats for one in known), sum(one.tokens for one in known), sum(o.bytes for o in known)
    return Perplexity(
        bits_per_byte=nats / math.log(2) / size,
        bits_per_character=nats / math.log(2) / sum(one.characters for one in known),
        perplexity=math.exp(nats / tokens),
        tokens=tokens,
        bytes=size,
        texts=len(known),
        skipped=len(scores) - len(known),
    )


def score(model: Any, tokenizer: Any, texts: Sequence[str], batch: int = 32, longest: int | None = None) -> Perplexity:
    """The model on all texts together; see `score_texts`."""
    return summarise(score_texts(model, tokenizer, texts, batch, longest))


def named_texts(arguments: Sequence[str]) -> dict[str, Path]:
    """`NAME=FILE` or `FILE`, which is then named after the file. Raises ValueError for a name given twice."""
    found: dict[str, Path] = {}
    for argument in arguments:
        name, equals, file = argument.partition("=")
        if not equals:
            name, file = Path(argument).stem, argument
        if name in found:
            raise ValueError(
                f"--text {argument}: a second text called {name!r}; write another name in front: NAME=FILE"
            )
        found[name] = Path(file)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line that says what to mend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, nargs="+", help="Hugging Face model directories or hub ids")
    parser.add_argument(
        "--text", required=True, nargs="+", metavar="[NAME=]FILE", help="JSONL with `text`, or a text in each line"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch", type=int, default=32, help="windows in a forward pass")
    parser.add_argument("--runs_dir", type=Path, default=Path(RunConfig().runs_dir), help="folder of all runs")
    options = parser.parse_args(arguments)
    results: dict[str, dict[str, Perplexity]] = {}
    try:
        files = named_texts(options.text)
        texts = {name: read_texts(file) for name, file in files.items()}
        for path in options.model:
            model, tokenizer = load_model(path, options.dtype)
            scores = {name: score_texts(model, tokenizer, found, options.batch) for name, found in texts.items()}
            results[path] = {name: summarise(found) for name, found in scores.items()}
            write_atomically(
                output_folder(path, options.runs_dir) / "perplexity.json",
                json.dumps(_content(path, options.dtype, files, scores), ensure_ascii=False, indent=1) + "\n",
            )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _print(results)
    for path in options.model:
        print(f"written: {output_folder(path, options.runs_dir) / 'perplexity.json'}")
    return 0


def _content(
    path: str, dtype: str, files: dict[str, Path], scores: dict[str, list[TextScore | None]]
) -> dict[str, object]:
    """perplexity.json: for each named text its file's hash, the means, and [bits, bytes, characters] of each text."""
    return {
        "model": path,
        "dtype": dtype,
        "texts": {
            name: {
                "file": str(files[name]),
                "sha256": hashlib.sha256(files[name].read_bytes()).hexdigest(),
                **asdict(summarise(found)),
                "each": [one and [round(one.nats / math.log(2), 4), one.bytes, one.characters] for one in found],
            }
            for name, found in scores.items()
        },
    }


def _print(results: dict[str, dict[str, Perplexity]]) -> None:
    print(f"{'bits/byte':>10}{'bits/char':>10}{'perplexity':>12}{'tokens':>9}  text  model")
    names = next(iter(results.values()))
    for name in names:
        for path, by_text in results.items():
            found = by_text[name]
            numbers = f"{found.bits_per_byte:10.4f}{found.bits_per_character:10.4f}{found.perplexity:12.3f}"
            print(f"{numbers}{found.tokens:9d}  {name:4}  {path}")


if __name__ == "__main__":
    sys.exit(main())
