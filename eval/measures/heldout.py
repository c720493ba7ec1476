"""Held-out questions, answered greedily as the trainer does at a run's end: SQuAD's token F1 and exact match.

    python eval/heldout.py --model DIR        asks as the model's run did
    python eval/measure.py heldout --model DIR --data questions.jsonl

Comparable between models that were asked alike, not with EuroEval's leaderboard (eval/run_euroeval.py).

Result (heldout.json): values f1 and exact_match, in percent; rows {id, question, context, answers, prediction, f1,
exact_match}.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from configs.io.jsonl import read_questions
from configs.io.results import Result, about_file, versions
from configs.prompts import Format, PromptKind, render
from configs.ranges import PositiveInt
from configs.schema import RunConfig
from eval.measures.intervals import interval, means
from eval.measures.model import Model, context_length, end_tokens
from rewards.answers import answer_row

Question = dict[str, Any]
_DEFAULTS = RunConfig()


@dataclass(frozen=True, kw_only=True)
class HeldoutSettings:
    """Which questions, and how they are put."""

    data: Path
    """JSONL with question, answers and perhaps context, id in each row."""
    template: str = _DEFAULTS.data.template
    """How a question becomes a prompt."""
    max_prompt_tokens: PositiveInt = _DEFAULTS.data.max_prompt_tokens
    """Longer prompts are counted and skipped."""
    max_new_tokens: PositiveInt = _DEFAULTS.sampling.max_new_tokens
    """Longest answer, in tokens."""
    questions: PositiveInt | None = _DEFAULTS.eval.questions
    """Questions asked, of those that fit. None: all."""
    batch: PositiveInt = _DEFAULTS.eval.batch
    """Questions answered at a time."""
    prompt: PromptKind = "auto"
    """How the model is asked: as student.prompt of a run."""
    system_prompt: str | None = None
    """A system message (chat)."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """More arguments of the chat template."""

    def asked(self, tokenizer: Any, ends: Collection[int] = ()) -> Format:
        """How a model with this tokenizer is asked; `ends`: what ends its texts where the tokenizer does not say."""
        said = (self.prompt, self.system_prompt, self.chat_template_kwargs)
        return Format(tokenizer, *said, parsed=self.template, model_ends=tuple(sorted(ends)))


def heldout(model: Model, settings: HeldoutSettings) -> Result:
    """Every question that fits, answered. Raises ValueError where none does."""
    questions = read_questions(settings.data)
    prompts = fitting_prompts(model, questions, settings)
    kept = list(prompts)[: settings.questions]
    replies = answers(model, [prompts[index] for index in kept], settings)
    rows = [answer_row(questions[index], reply) for index, reply in zip(kept, replies, strict=True)]
    places = [str(place) for place in range(len(rows))]
    values = {key: interval(means(places, [row[key] for row in rows])) for key in ("f1", "exact_match")}
    used, skipped = len(kept), len(questions) - len(prompts)
    return Result(measure="heldout", values=values, rows=rows, **described(model, settings, used, skipped, questions))


def described(
    model: Model, settings: HeldoutSettings, used: int, skipped: int, questions: Sequence[Question]
) -> dict[str, Any]:
    """The fields of a `Result` that say what was asked of whom: `used` of the questions, `skipped` as too long."""
    how = asdict(settings)
    del how["data"]
    return {
        "model": model.path,
        "data": {**about_file(settings.data, used, len(questions)), "skipped_too_long": skipped},
        "settings": {**how, "dtype": model.dtype},
        "versions": versions("torch", "transformers"),
    }


def fitting_prompts(model: Model, questions: Sequence[Question], settings: HeldoutSettings) -> dict[int, list[int]]:
    """Prompts by the places of their questions, where there is room for an answer. Raises ValueError if nowhere."""
    asked = settings.asked(model.tokenizer)
    prompts = [list(asked.prompt(render(one, settings.template))) for one in questions]
    why, mend, longest = "data.max_prompt_tokens", "raise it in the run's config.yaml", settings.max_prompt_tokens
    room = context_length(model.network)  # for prompt and answer
    if room is not None and room - settings.max_new_tokens < longest:
        longest, mend = room - settings.max_new_tokens, "lower it"
        why = f"sampling.max_new_tokens = {settings.max_new_tokens} of the {room} that the model has room for"
    fitting = {index: prompt for index, prompt in enumerate(prompts) if len(prompt) <= longest}
    if not fitting:
        raise ValueError(
            f"{why}: every prompt is longer than {longest} tokens (the shortest has {min(map(len, prompts))}); {mend}, "
            "or shorten the contexts"
        )
    return fitting


def answers(
    model: Model, prompts: Sequence[list[int]], settings: HeldoutSettings, *, sampled: bool = False
) -> list[str]:
    """The model's answer to each prompt, up to its end or max_new_tokens: the likeliest token each time, or sampled at
    temperature 1 from torch's generator.

    The whole answer is given back, stripped and without thoughts (`Format.scored`); a model that does not stop is not
    helped by cutting at a new line.
    """
    from tqdm import tqdm

    from eval.measures.generation import Decoding, generate

    ends = end_tokens(model.network, model.tokenizer)
    ends |= {settings.asked(model.tokenizer, ends).end}
    decoding = Decoding(max_new_tokens=settings.max_new_tokens, batch=settings.batch, ends=ends, sampled=sampled)
    path = Path(model.path)
    label = path.parent.name if path.name == "export" else path.name
    with tqdm(total=len(prompts), desc=label, unit="answer", dynamic_ncols=True) as bar:
        found = generate(model.network, prompts, decoding, progress=bar.update)
    tokens = [one.tokens[:-1] if one.tokens[-1] in ends else one.tokens for one in found]
    asked = settings.asked(model.tokenizer, ends)
    return [asked.scored(asked.said(one)) for one in tokens]
