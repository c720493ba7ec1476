"""How well a model translates between Faroese and English or Danish: chrF++ and BLEU on FLORES-200.

    python eval/translate.py --model runs/NAME/export [TEACHER ...]                      # from the hub
    python eval/translate.py --model DIR --data sentences.jsonl --examples dev.jsonl     # own sentences

Base models see `--few_shot` examples (sentences of the dev split); chat models (a tokenizer with a chat template) are
asked in their template, without examples. Greedy; a translation ends with its line. Results: translate.json beside the
model's other evaluations, with sacrebleu's signatures. What is done is kept: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

if not __package__:  # started as a script: our rooms first, and no file of this folder hides a library
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from tqdm import tqdm
from transformers import GenerationConfig

from configs.files import write_atomically
from configs.schema import RunConfig
from eval.model_dirs import output_folder
from eval.parallel_text import NAMES, ParallelText, load_parallel
from eval.perplexity import load_model

DIRECTIONS = ("eng-fao", "fao-eng", "dan-fao", "fao-dan")
SAVE_EVERY_S = 30.0
"""Seconds between writes of what is done."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How sentences are put; part of what makes two results comparable."""

    kind: str
    """`base` (examples in the prompt) or `instruct` (chat template)."""
    few_shot: int
    """Examples in the prompt of a base model."""
    max_new_tokens: int
    """Longest translation, in tokens."""
    dtype: str
    """Parameter and compute type."""


def prompt_text(sentence: str, direction: str, examples: Sequence[tuple[str, str]], kind: str) -> str:
    """What a model reads: examples and the sentence, or a request."""
    source, target = (NAMES[language] for language in direction.split("-"))
    if kind == "instruct":
        return (
            f"Translate the following sentence from {source} into {target}. Answer with the translation only.\n\n"
            f"{sentence}"
        )
    shown = [f"{source}: {one}\n{target}: {other}\n\n" for one, other in examples]
    return f"{''.join(shown)}{source}: {sentence}\n{target}:"


def prompt_tokens(tokenizer: Any, text: str, kind: str) -> list[int]:
    """Token ids, with a chat's frame where the model chats."""
    if kind != "instruct":
        return list(tokenizer(text)["input_ids"])
    messages = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False))


def ends_of(model: Any, tokenizer: Any, kind: str) -> list[int]:
    """Tokens that end a translation: the model's own, and for a base model each that holds a line break."""
    own = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    if kind == "base":
        texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        ends |= {token for token, text in enumerate(texts) if "\n" in text}
    return sorted(ends)


@torch.inference_mode()
def continue_batch(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], ends: list[int], longest: int
) -> list[str]:
    """Greedy continuations up to an end or `longest` tokens; the first line of each, stripped."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    # A configuration of our own: those of published models often switch sampling or penalties on.
    generation = GenerationConfig(do_sample=False, max_new_tokens=longest, pad_token_id=pad, eos_token_id=ends or None)
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=generation
    )
    stops, written = set(ends), []
    for row in output[:, width:].tolist():
        end = next((place for place, token in enumerate(row) if token in stops), len(row))
        # The ending token may begin with letters (".\n"): it is read too, and what follows its line break is cut.
        text = tokenizer.decode(row[: end + 1], skip_special_tokens=True).strip()
        written.append(text.split("\n", 1)[0].strip())
    return written


def translate(
    model: Any, tokenizer: Any, text: ParallelText, examples: ParallelText, direction: str, settings: Settings,
    known: dict[int, str], *, batch: int, save: Any,
) -> dict[int, str]:  # fmt: skip
    """A translation of every sentence, by number. `known`: done before. `save`: called with what is done, now and then.

    Raises ValueError where a prompt does not fit into the model.
    """
    source, target = direction.split("-")
    shown = list(zip(examples.sentences[source], examples.sentences[target], strict=True))[: settings.few_shot]
    sentences = text.sentences[source]
    prompts = {
        number: prompt_tokens(tokenizer, prompt_text(sentence, direction, shown, settings.kind), settings.kind)
        for number, sentence in enumerate(sentences)
        if number not in known
    }
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, prompts.values()), default=0) + settings.max_new_tokens
    if room is not None and longest > room:
        raise ValueError(
            f"{direction}: prompt and translation take {longest} tokens, and the model has room for {room}; lower "
            "--few_shot or --max_new_tokens"
        )
    ends = ends_of(model, tokenizer, settings.kind)
    done, order = dict(known), sorted(prompts, key=lambda number: len(prompts[number]))
    saved = time.monotonic()
    with tqdm(total=len(sentences), initial=len(known), desc=direction, unit="sentence", dynamic_ncols=True) as bar:
        for begin in range(0, len(order), batch):
            numbers = order[begin : begin + batch]
            found = continue_batch(
                model, tokenizer, [prompts[number] for number in numbers], ends, settings.max_new_tokens
            )
            done |= dict(zip(numbers, found, strict=True))
            bar.update(len(numbers))
            if time.monotonic() - saved > SAVE_EVERY_S:
                save(done)
                saved = time.monotonic()
    save(done)
    return done


def score(written: Sequence[str], references: Sequence[str]) -> dict[str, dict[str, Any]]:
    """chrF++ and BLEU of the corpus, with sacrebleu's signatures."""
    found = {}
    for name, metric in (("chrf", CHRF(word_order=2)), ("bleu", BLEU())):
        value = metric.corpus_score(list(written), [list(references)]).score
        found[name] = {"score": value, "signature": str(metric.get_signature())}
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line that says what to mend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, nargs="+", help="Hugging Face model directories or hub ids")
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS), help="what into what")
    parser.add_argument("--data", default="facebook/flores", help="hub id, FLORES-200's folder, or a table")
    parser.add_argument("--split", default="devtest", help="split of FLORES that is translated")
    parser.add_argument("--examples", help="a table of examples (default: split `dev` of --data)")
    parser.add_argument("--kind", choices=["auto", "base", "instruct"], default="auto", help="how the model is asked")
    parser.add_argument("--few_shot", type=int, default=5, help="examples in a base model's prompt")
    parser.add_argument("--sentences", type=int, help="translate the first ones only")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest translation")
    parser.add_argument("--batch", type=int, default=16, help="sentences at a time")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--runs_dir", type=Path, default=Path(RunConfig().runs_dir), help="folder of all runs")
    options = parser.parse_args(arguments)
    try:
        text, examples = _texts(options)
        for path in options.model:
            _evaluate(path, text, examples, options)
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _texts(options: argparse.Namespace) -> tuple[ParallelText, ParallelText]:
    """What is translated, and what examples are taken from: never the same sentences."""
    languages = sorted({language for direction in options.directions for language in direction.split("-")})
    if options.few_shot < 0 or options.batch < 1 or options.max_new_tokens < 1:
        raise ValueError("--few_shot must be at least 0, --batch and --max_new_tokens at least 1")
    text = load_parallel(options.data, languages, options.split)
    if options.few_shot == 0 or options.kind == "instruct":
        return text, ParallelText(source="local", name="none", sentences={language: [] for language in languages})
    table = Path(options.data).suffix != "" and not Path(options.data).is_dir()
    if options.examples is None and table:
        raise ValueError(f"--data {options.data}: give other sentences for the prompts in --examples, or --few_shot 0")
    examples = load_parallel(options.examples or options.data, languages, "dev")
    count = len(next(iter(examples.sentences.values())))
    if count < options.few_shot:
        raise ValueError(
            f"--few_shot {options.few_shot}: {examples.name} has {count} sentences; give more, or ask less"
        )
    shown = {sentence for lines in examples.sentences.values() for sentence in lines[: options.few_shot]}
    judged = {sentence for lines in text.sentences.values() for sentence in lines}
    if shared := shown & judged:
        raise ValueError(f"--examples: a sentence of the prompt is translated too: {min(shared)[:80]!r}; give others")
    return text, examples


def _evaluate(path: str, text: ParallelText, examples: ParallelText, options: argparse.Namespace) -> None:
    """All directions of one model; what an earlier call did is kept where it was done alike."""
    model, tokenizer = load_model(path, options.dtype)
    kind = options.kind if options.kind != "auto" else "instruct" if tokenizer.chat_template else "base"
    settings = Settings(
        kind=kind, few_shot=options.few_shot if kind == "base" else 0, max_new_tokens=options.max_new_tokens,
        dtype=options.dtype,
    )  # fmt: skip
    output = output_folder(path, options.runs_dir) / "translate.json"
    kept = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {}
    weights = _weights_digest(path)
    if kept.get("settings") != asdict(settings) or kept.get("weights") != weights:
        kept = {}
    content: dict[str, Any] = {
        "model": path, "weights": weights, "settings": asdict(settings),
        "versions": {name: version(name) for name in ("sacrebleu", "torch", "transformers")},
        "directions": dict(kept.get("directions") or {}),
    }  # fmt: skip
    for direction in options.directions:
        pair = direction.split("-")
        part = _first(text, options.sentences)
        data = {"source": part.source, "name": part.name, "revision": part.revision, "sha256": part.digest(pair),
                "examples_sha256": _first(examples, settings.few_shot).digest(pair)}  # fmt: skip
        partial = output.with_name(f"translate-{direction}.partial.json")  # what is done of an unfinished direction
        key = [data, asdict(settings), weights]

        def save(done: dict[int, str], partial: Path = partial, key: list[Any] = key) -> None:
            write_atomically(partial, json.dumps({"key": key, "done": done}, ensure_ascii=False))

        known = _known(content["directions"].get(direction), partial, key)
        begin = time.monotonic()
        done = translate(model, tokenizer, part, examples, direction, settings, known, batch=options.batch, save=save)
        references = part.sentences[pair[1]]
        written = [done[number] for number in range(len(references))]
        content["directions"][direction] = {
            "metrics": score(written, references), "data": data, "few_shot": settings.few_shot,
            "seconds": round(time.monotonic() - begin, 1),
            "sentences": [
                {"id": number, "source": part.sentences[pair[0]][number], "reference": reference, "written": said}
                for number, (reference, said) in enumerate(zip(references, written, strict=True))
            ],
        }  # fmt: skip
        write_atomically(output, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
        partial.unlink(missing_ok=True)
    print(f"\n{'chrF++':>8}{'BLEU':>8}  direction  ({kind}, {settings.few_shot} examples)  {path}")
    for direction in options.directions:
        found = content["directions"][direction]["metrics"]
        print(f"{found['chrf']['score']:8.1f}{found['bleu']['score']:8.1f}  {direction}")
    print(f"written: {output}")


def _known(earlier: dict[str, Any] | None, partial: Path, key: list[Any]) -> dict[int, str]:
    """Translations of an earlier call that were made in the same way."""
    if earlier is not None and earlier["data"] == key[0]:
        return {row["id"]: row["written"] for row in earlier["sentences"]}
    started = json.loads(partial.read_text(encoding="utf-8")) if partial.is_file() else {}
    return {int(number): said for number, said in started["done"].items()} if started.get("key") == key else {}


def _first(text: ParallelText, count: int | None) -> ParallelText:
    return ParallelText(
        source=text.source, name=text.name, revision=text.revision,
        sentences={language: lines[:count] for language, lines in text.sentences.items()},
    )  # fmt: skip


def _weights_digest(path: str) -> str:
    """Changes when the weights do: names, sizes and times of the files; a hub id stands for itself."""
    files = sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else []
    known = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return hashlib.sha256(json.dumps(known or path).encode()).hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
