"""How well a model translates between Faroese and English or Danish: chrF++ and BLEU on FLORES-200.

    python eval/measure.py translate --model runs/NAME/export [TEACHER ...]                      # from the hub
    python eval/measure.py translate --model DIR --data sentences.jsonl --examples dev.jsonl     # own sentences

--data and --examples are one of

    facebook/flores, openlanguagedata/flores_plus    hub ids: a configuration for each language (fao_Latn), splits dev
                                                     and devtest (both ask for consent: log in first)
    flores200_dataset/                               a folder as FLORES-200 is packed: devtest/fao_Latn.devtest
    sentences.jsonl, .csv, .tsv, .parquet            a column for each language: {"fao": ..., "eng": ..., "dan": ...}

Sentences with the same number say the same thing. FLORES asks that its text is not put onto the web in the clear.

Base models see `--few_shot` examples (sentences of the dev split); chat models (a tokenizer with a chat template) are
asked in their template, without examples. Greedy; a translation ends with its line. What is done is kept: the same
command continues where it stopped, and other directions are added.

Result (translate.json): values DIRECTION/{chrf, bleu}, data by DIRECTION, sacrebleu's signatures in settings, rows
{direction, id, source, reference, written}.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from configs.io.jsonl import read_jsonl
from configs.io.results import Result, read_result, versions
from configs.prompts import Format
from configs.ranges import NonNegativeInt, PositiveInt
from eval.measures.intervals import interval, translations
from eval.measures.model import Model, context_length, end_tokens

NAMES = {"fao": "Faroese", "eng": "English", "dan": "Danish"}
Direction = Literal["eng-fao", "fao-eng", "dan-fao", "fao-dan"]


@dataclass(frozen=True, kw_only=True)
class TranslateSettings:
    """Which sentences, and how they are put."""

    directions: tuple[Direction, ...] = ("eng-fao", "fao-eng", "dan-fao", "fao-dan")
    """Translation directions."""
    data: str = "facebook/flores"
    """Hub id, FLORES-200's folder, or a table."""
    split: str = "devtest"
    """Split of FLORES that is translated."""
    examples: str | None = None
    """A table of examples; by default split `dev` of --data."""
    kind: Literal["auto", "base", "instruct"] = "auto"
    """How the model is asked; auto: instruct where the tokenizer has a chat template."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=lambda: {"enable_thinking": False})
    """More arguments of the chat template; a model that can think aloud first is asked not to, as EuroEval does."""
    few_shot: NonNegativeInt = 5
    """Examples in a base model's prompt."""
    sentences: PositiveInt | None = None
    """Translate the first ones only."""
    max_new_tokens: PositiveInt = 256
    """Longest translation."""
    batch: PositiveInt = 16
    """Sentences at a time."""


@dataclass(frozen=True, kw_only=True)
class ParallelText:
    """The same sentences in several languages."""

    name: str
    """Where they are from, and which split."""
    sentences: dict[str, list[str]]
    """By language; equally many."""

    def digest(self, languages: Sequence[str]) -> str:
        """SHA-256 of the sentences of these languages."""
        text = "\0".join("\n".join(self.sentences[language]) for language in languages)
        return hashlib.sha256(text.encode()).hexdigest()

    def first(self, count: int | None) -> ParallelText:
        """The first sentences; None: all."""
        return replace(self, sentences={language: lines[:count] for language, lines in self.sentences.items()})


def translate(model: Model, settings: TranslateSettings) -> Result:
    """All directions. Raises ValueError where sentences are missing or a prompt does not fit into the model."""
    text, examples = _texts(settings)
    kind = settings.kind
    if kind == "auto":
        kind = "instruct" if model.tokenizer.chat_template else "base"
    settings = replace(settings, kind=kind, few_shot=settings.few_shot if kind == "base" else 0)
    asked: dict[str, Any] = {
        "kind": kind,
        "few_shot": settings.few_shot,
        "max_new_tokens": settings.max_new_tokens,
        "dtype": model.dtype,
        **_signatures(),
    }
    if kind == "instruct":
        asked["chat_template_kwargs"] = settings.chat_template_kwargs
    made = {**versions("sacrebleu", "torch", "transformers"), "weights": model.weights}
    earlier = _earlier(model.folder / "translate.json", asked, made)
    values, data, rows = dict(earlier.values), dict(earlier.data), list(earlier.rows)
    for direction in settings.directions:
        source, target = direction.split("-")
        shown = examples.first(settings.few_shot)
        about = {
            "path": text.name,
            "sha256": text.digest([source, target]),
            "examples_sha256": shown.digest([source, target]),
            "rows": len(text.sentences[source]),
        }
        if data.get(direction) == about:
            continue
        written = _written(model, text.sentences[source], direction, shown, settings)
        references = text.sentences[target]
        places = [str(place) for place in range(len(written))]
        values |= {
            f"{direction}/{metric}": interval(translations(places, written, references, metric))
            for metric in ("chrf", "bleu")
        }
        data[direction] = about
        rows = [row for row in rows if row["direction"] != direction] + [
            {"direction": direction, "id": place, "source": sentence, "reference": reference, "written": said}
            for place, sentence, reference, said in zip(
                places, text.sentences[source], references, written, strict=True
            )
        ]
    for journal in model.folder.glob("translate-*.journal.jsonl"):
        journal.unlink()
    return Result(
        measure="translate", model=model.path, data=data, settings=asked, versions=made, values=values, rows=rows
    )


def _texts(settings: TranslateSettings) -> tuple[ParallelText, ParallelText]:
    """What is translated, and what examples are taken from: never the same sentences."""
    languages = sorted({language for direction in settings.directions for language in direction.split("-")})
    text = load_parallel(settings.data, languages, settings.split)
    if settings.few_shot == 0 or settings.kind == "instruct":
        return text.first(settings.sentences), text.first(0)
    if settings.examples is None and Path(settings.data).is_file():
        mend = "give other sentences for the prompts in --examples, or --few_shot 0"
        raise ValueError(f"--data {settings.data}: {mend}")
    examples = load_parallel(settings.examples or settings.data, languages, "dev")
    count = len(examples.sentences[languages[0]])
    if count < settings.few_shot:
        raise ValueError(
            f"--few_shot {settings.few_shot}: {examples.name} has {count} sentences; give more, or ask less"
        )
    shown = examples.first(settings.few_shot)
    both = [{sentence for lines in one.sentences.values() for sentence in lines} for one in (shown, text)]
    if shared := both[0] & both[1]:
        raise ValueError(f"--examples: a sentence of the prompt is translated too: {min(shared)[:80]!r}; give others")
    return text.first(settings.sentences), examples


def load_parallel(data: str, languages: Sequence[str], split: str) -> ParallelText:
    """Raises ValueError, naming file and line, where a language is missing or sentences do not match up."""
    path = Path(data)
    if path.is_file():
        rows = read_jsonl(path, list(languages))
        name, found = data, {language: [str(row[language]) for row in rows] for language in languages}
    elif path.is_dir():
        name = f"{path} ({split})"
        found = {language: _flores_file(path / split / f"{language}_Latn.{split}") for language in languages}
    else:
        name = f"{data}:{split}"
        found = {language: _from_hub(f"{data}:{language}_Latn:{split}") for language in languages}
    counts = {language: len(lines) for language, lines in found.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"{name}: {counts} sentences; each language needs the same ones")
    return ParallelText(
        name=name, sentences={language: [" ".join(line.split()) for line in lines] for language, lines in found.items()}
    )


def _flores_file(file: Path) -> list[str]:
    if not file.is_file():
        raise ValueError(f"{file}: no such file; a FLORES-200 folder has it, a sentence a line")
    lines = file.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    for number, line in enumerate(lines, 1):  # skipped, it would move what follows to another language's sentence
        if not line.strip():
            raise ValueError(f"{file}, line {number}: is blank; the n-th lines of all languages are one sentence")
    return lines


def _from_hub(name: str) -> list[str]:
    return [row.get("text") or row["sentence"] for row in read_jsonl(name)]


def _signatures() -> dict[str, str]:
    """How sacrebleu counts. A metric knows its signature when it has scored something."""
    metrics = {"chrf": CHRF(word_order=2), "bleu": BLEU()}
    for metric in metrics.values():
        metric.corpus_score(["a"], [["a"]])
    return {f"{name}_signature": str(metric.get_signature()) for name, metric in metrics.items()}


def _earlier(file: Path, asked: dict[str, Any], made: dict[str, str]) -> Result:
    """What an earlier call found of the same model in the same way; else nothing."""
    if file.is_file():
        found = read_result(file)
        if found.settings == asked and found.versions == made:
            return found
    return Result(measure="translate", model="", data={}, settings={}, versions={}, values={}, rows=[])


def _written(
    model: Model, sentences: Sequence[str], direction: str, shown: ParallelText, settings: TranslateSettings
) -> list[str]:
    """A translation of every sentence: the first line of a greedy continuation."""
    from tqdm import tqdm

    from eval.measures.generation import Decoding, Journal, generate

    source, target = direction.split("-")
    pairs = list(zip(shown.sentences[source], shown.sentences[target], strict=True))
    chat = settings.kind == "instruct"
    asked = Format(model.tokenizer, "chat" if chat else "plain", template_kwargs=settings.chat_template_kwargs)
    prompts = [list(asked.prompt(prompt_text(one, direction, pairs, chat))) for one in sentences]
    longest, room = max(map(len, prompts)) + settings.max_new_tokens, context_length(model.network)
    if room is not None and longest > room:
        raise ValueError(
            f"{model.path}: a prompt with its translation takes up to {longest} tokens, the model has room for {room}; "
            "lower --few_shot or --max_new_tokens"
        )
    ends = ends_of(model.network, model.tokenizer, chat)
    decoding = Decoding(max_new_tokens=settings.max_new_tokens, batch=settings.batch, ends=ends)
    journal = Journal(model.folder / f"translate-{model.weights}-{model.dtype}.journal.jsonl")
    with tqdm(total=len(prompts), desc=direction, unit="sentence", dynamic_ncols=True) as bar:
        found = generate(model.network, prompts, decoding, journal, bar.update)
    # The ending token may begin with letters (".\n"): it is read too, and what follows its line break is cut.
    texts = (asked.scored(model.tokenizer.decode(one.tokens, skip_special_tokens=True).strip()) for one in found)
    return [text.split("\n", 1)[0].strip() for text in texts]


def prompt_text(sentence: str, direction: str, examples: Sequence[tuple[str, str]], chat: bool) -> str:
    """What a model reads: examples and the sentence, or a request."""
    source, target = (NAMES[language] for language in direction.split("-"))
    if chat:
        return (
            f"Translate the following sentence from {source} into {target}. Answer with the translation only.\n\n"
            f"{sentence}"
        )
    shown = [f"{source}: {one}\n{target}: {other}\n\n" for one, other in examples]
    return f"{''.join(shown)}{source}: {sentence}\n{target}:"


def ends_of(network: Any, tokenizer: Any, chat: bool) -> frozenset[int]:
    """Tokens that end a translation: the model's own, and for a base model each that holds a line break."""
    ends = end_tokens(network, tokenizer)
    if chat:
        return ends
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return ends | {token for token, text in enumerate(texts) if "\n" in text}
