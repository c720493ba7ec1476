"""Questions and answers as tokens: how each model is asked, and which questions it has room for."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from configs.checks import require
from configs.io.jsonl import read_open_questions, read_questions
from configs.models import AskedConfig
from configs.prompts import Format, as_text, render
from configs.schema import DataConfig
from inference.attention.packing import Group
from inference.model.files import end_ids
from inference.protocol.fingerprint import load_tokenizer
from training.experience import Prompt
from training.run.launcher import environment_rank

log = logging.getLogger(__name__)


def format_of(key: str, model: AskedConfig, data: DataConfig) -> Format:
    """How `model`, the setting `key` (student), is asked. Raises ValueError where its tokenizer cannot be read or names
    no end, and where its chat template is missing or fails."""
    try:
        tokenizer = load_tokenizer(model.path)
    except Exception as error:  # a broken file raises nearly anything
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{key}.path = {model.path!r}: its tokenizer cannot be read ({reason})") from None
    require(
        model.prompt != "chat" or bool(tokenizer.chat_template), f"{key}.prompt", model.prompt,
        f"the tokenizer in {model.path} has no chat template; set it to plain",
    )  # fmt: skip
    found = Format(
        tokenizer, model.prompt, model.system_prompt, model.chat_template_kwargs,
        parsed=data.template, model_ends=end_ids(Path(model.path)),
    )  # fmt: skip
    for name in ("system_prompt", "chat_template_kwargs"):
        value = getattr(model, name)
        mend = (
            f"is for a chat template, and the model is asked in plain text; leave it out, or set {key}.prompt to chat"
        )
        require(found.chat or not value, f"{key}.{name}", value, mend)
    try:
        found.rendered("Hvat?")
        require(found.end >= 0, f"{key}.path", model.path, "no end")
    except ValueError as error:
        raise ValueError(f"{key}.path = {model.path!r}: {error}") from None
    words = set(re.findall(r"\w+", tokenizer.get_chat_template() if found.chat else ""))
    unknown = [name for name in model.chat_template_kwargs if name not in words]
    mend = f"its chat template does not use {', '.join(unknown)}; correct the name, or leave it out"
    require(not unknown, f"{key}.chat_template_kwargs", model.chat_template_kwargs, mend)
    return found


def load_prompts(key: str, data: DataConfig, asked: Format, *, room: int, need_answers: bool) -> list[Prompt]:
    """All questions of the data of setting `key` (data.prompts), asked in that format, that fit into `room` tokens and
    data.max_prompt_tokens.

    Raises ValueError for a malformed file, and where no question fits.
    """
    path = getattr(data, key.removeprefix("data."))
    rows = read_open_questions(path) if key == "data.open" else read_questions(path, answers=need_answers)
    limit = min(data.max_prompt_tokens, room)
    prompts: list[Prompt] = []
    too_long: list[int] = []
    for row in rows:
        said = render(row, data.template)
        try:
            tokens = asked.prompt(said)
        except ValueError as error:  # a chat template is a program, which may refuse some text
            raise ValueError(f"{key} = {path!r}: {error} for {as_text(said)[:40]!r}") from None
        if len(tokens) > limit or not tokens:
            too_long.append(len(tokens))
            continue
        prompts.append(
            Prompt(
                index=len(prompts),
                text=as_text(said),
                tokens=tokens,
                answers=tuple(row.get("answers") or ()),
                question=row["question"],
                context=row.get("context"),
                id="" if row.get("id") is None else str(row["id"]),
                pattern=row.get("pattern"),
                question_en=row.get("question_en"),
                context_en=row.get("context_en"),
                turns=() if isinstance(said, str) else tuple(said),
            )
        )
    if not prompts:
        raise ValueError(
            f"{key} = {path!r}: all {len(rows)} prompts are longer than {limit} tokens (the longest has "
            f"{max(too_long)}); raise data.max_prompt_tokens, or use a model with a longer context"
        )
    if too_long and environment_rank() == 0:
        log.warning(
            "%s = %r: %d of %d prompts are too long and are skipped (the longest has %d tokens; "
            "data.max_prompt_tokens and the models' contexts leave %d)",
            key, path, len(too_long), len(rows), max(too_long), limit,
        )  # fmt: skip
    return prompts


def answer_group(prompt: Prompt, answer: str, asked: Format, *, ended: bool = True) -> Group:
    """A prompt with one answer to imitate, and what ends it, unless it was cut off."""
    tokens = asked.answer(answer)
    return Group(prompt=prompt.tokens, responses=((*tokens, asked.end) if ended else tokens,))
