"""How a model is asked, and what ends its answer: in plain text, or in its chat template.

Student, teacher and evaluation ask through `Format`; it takes a transformers tokenizer and imports no library.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from itertools import groupby
from typing import Any, Literal

PromptKind = Literal["auto", "plain", "chat"]
Turn = dict[str, str]
"""A turn of a chat: role and content."""
Asked = str | Sequence[Turn]
"""A text, or a conversation that ends with the question."""
DATE = datetime(2025, 1, 1)
"""What a chat template that writes today's date gets: prompts stay the same when a run is resumed on another day."""
_MARK = "\uf8f5"
"""Stands on both sides of a special symbol's name that is only text."""


def render(row: Mapping[str, Any], template: str) -> Asked:
    """What a question row asks: its own prompt as it stands, or the question in place of {question} in the template,
    its context in a line before it."""
    if row.get("prompt") is not None:
        return row["prompt"]
    asked = template.replace("{question}", row["question"])
    return f"Tekstur: {row['context']}\n{asked}" if row.get("context") else asked


def as_text(asked: Asked) -> str:
    """A conversation as a plain model reads it: each turn behind its role, and then whose turn it is."""
    if isinstance(asked, str):
        return asked
    return "".join(f"{turn['role']}: {turn['content']}\n\n" for turn in asked) + "assistant:"


@dataclass(frozen=True)
class Format:
    """How one model is asked. Raises ValueError where the template cannot be applied."""

    tokenizer: Any
    """transformers' tokenizer."""
    kind: PromptKind = "plain"
    """plain; chat: a user's message (or a conversation) in the tokenizer's chat template; auto: where it has one."""
    system: str | None = None
    """A system message before it (chat), where a conversation does not begin with its own."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """What else the chat template takes."""
    parsed: str = ""
    """Text whose special symbols are meant: those in a data.template. All others in a prompt are only text."""
    model_ends: tuple[int, ...] = ()
    """End symbols that the model names itself, for a tokenizer that names none."""

    @cached_property
    def chat(self) -> bool:
        """Whether prompts go through the chat template."""
        return self.kind == "chat" or (self.kind == "auto" and bool(self.tokenizer.chat_template))

    @property
    def lead(self) -> str:
        """What stands between prompt and answer: a space behind a plain template that ends in a colon, say; nothing
        behind one that ends in white space, or in a chat template, which ends where text begins."""
        return "" if self.chat or self.parsed[-1:].isspace() else " "

    @property
    def end_of_text(self) -> int:
        """What ends a text: the tokenizer's end symbol, or else the model's. Raises ValueError where neither is."""
        own = self.tokenizer.eos_token_id
        if own is None and not self.model_ends:
            raise ValueError("the tokenizer names no eos_token and the model no eos_token_id; set one of them")
        return int(self.model_ends[0] if own is None else own)

    @cached_property
    def end(self) -> int:
        """What ends an answer: in a chat the special symbol that the template puts behind one, where it puts any."""
        if not self.chat:
            return self.end_of_text
        messages = [{"role": "user", "content": "Hvat?"}, {"role": "assistant", "content": "Svar"}]
        ids = self._ids(self._applied(messages, answering=False).rpartition("Svar")[2].lstrip())
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return ids[0] if ids and ids[0] in special | {self.tokenizer.eos_token_id} else self.end_of_text

    def rendered(self, prompt: Asked) -> str:
        """The text that the model goes on from, special symbols and all."""
        return self._marked(prompt).replace(_MARK, "")

    def prompt(self, prompt: Asked) -> tuple[int, ...]:
        """Token ids of a prompt: the beginning of text where the model has one, and never an end."""
        marked = self._marked(prompt)
        if self.chat:
            return tuple(self._pieces(marked))
        if _MARK in marked:
            whole, text = self.prompt("a"), self._ids("a")
            return (*whole[: len(whole) - len(text)], *self._pieces(marked))
        ids, bare = list(self.tokenizer(marked)["input_ids"]), self._ids(marked)
        behind = next((n for n in range(len(ids) - len(bare), -1, -1) if ids[n : n + len(bare)] == bare), None)
        return tuple(ids if behind is None else ids[: behind + len(bare)])

    def answer(self, text: str) -> tuple[int, ...]:
        """Token ids of an answer behind a prompt, without an end symbol."""
        said = self.lead + text.strip()
        if said.startswith(" ") and self._adds_a_space():
            said = said[1:]  # the tokenizer's own space, or the answer would have two
        return tuple(self.text(said))

    def scored(self, text: str) -> str:
        """What counts of a reply (`said`): of a model that thinks aloud what it says behind its last `</think>`, and
        nothing where it does not come to that, as in EuroEval. A chat template may have begun the thoughts already."""
        _, end, answer = text.rpartition("</think>")
        begun = text.startswith("<think>") or (self.chat and self.rendered("Hvat?").rstrip().endswith("<think>"))
        return answer.strip() if end or not begun else ""

    def text(self, text: str) -> list[int]:
        """Token ids of a text that is only text: the names of special symbols in it are spelt out."""
        return self._pieces(self._guarded(text, ""))

    def said(self, tokens: Sequence[int]) -> str:
        """The text of an answer, without special symbols and stripped."""
        stretches = groupby(tokens, self._garbled.get)
        parts = (
            self.tokenizer.decode(list(run), skip_special_tokens=True) if word is None else word * len(list(run))
            for word, run in stretches
        )
        return "".join(parts).strip()

    def placed(self, text: str) -> list[tuple[int, int]]:
        """The same, each with the character of the text where it begins; by a fast tokenizer only."""
        found: list[tuple[int, int]] = []
        at = 0
        for part, options in self._stretches(self._guarded(text, "")):
            made = self.tokenizer(part, add_special_tokens=False, return_offsets_mapping=True, **options)
            starts = (at + start for start, _ in made["offset_mapping"])
            found += zip(made["input_ids"], starts, strict=True)
            at += len(part)
        return found

    def _marked(self, prompt: Asked) -> str:
        if not self.chat:
            return self._guarded(as_text(prompt), self.parsed)
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        own = self.system is not None and turns[0]["role"] != "system"
        system = [{"role": "system", "content": str(self.system)}] if own else []
        guarded = [{**turn, "content": self._guarded(turn["content"], self.parsed)} for turn in turns]
        said = self._applied([*system, *guarded], answering=True)
        for turn in (*system, *guarded[:1]):
            if turn["role"] == "system" and turn["content"].strip() not in said:
                raise ValueError(
                    "its chat template leaves the system message out; put it into the user's first message"
                )
        return said

    def _applied(self, messages: list[dict[str, str]], *, answering: bool) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=answering, chat_template=self._template,
                    **self.template_kwargs,
                )
            )  # fmt: skip
        except Exception as error:  # a template is a program, and may fail in any way
            raise ValueError(f"its chat template failed ({' '.join(str(error).split())[:200]})") from None

    @cached_property
    def _template(self) -> str:
        """The chat template, today's date in it replaced by DATE."""
        dated = r"""strftime_now\((["'])(.*?)\1\)"""
        return re.sub(dated, lambda call: repr(DATE.strftime(call[2])), self.tokenizer.get_chat_template())

    def _guarded(self, text: str, parsed: str) -> str:
        """The text with a mark on both sides of each special symbol's name that is not in `parsed`."""
        text = text.replace(_MARK, "")
        if not any(letter in text for letter in self._first_letters):
            return text
        names = [name for name in self._symbols if name in text and name not in parsed]
        if not names:
            return text
        either = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
        return re.sub(either, lambda found: f"{_MARK}{found[0]}{_MARK}", text)

    @cached_property
    def _garbled(self) -> dict[int, str]:
        """Added words, by id, that the tokenizer would write wrong: a byte-level one takes their letters for bytes."""
        added = {i: str(token.content) for i, token in self.tokenizer.added_tokens_decoder.items() if not token.special}
        odd = {i: word for i, word in added.items() if not word.isascii()}
        return {i: word for i, word in odd.items() if self.tokenizer.decode([i]).strip() != word.strip()}

    @cached_property
    def _symbols(self) -> set[str]:
        added = self.tokenizer.added_tokens_decoder.values()
        return {str(token.content) for token in added if token.special} | set(self.tokenizer.all_special_tokens)

    @cached_property
    def _symbol_ids(self) -> set[int]:
        return {*self.tokenizer.convert_tokens_to_ids(list(self._symbols))} - {self.tokenizer.unk_token_id}

    @cached_property
    def _first_letters(self) -> set[str]:
        return {name[0] for name in self._symbols if name}

    def _pieces(self, marked: str) -> list[int]:
        """Token ids of the stretches between marks, every second of which is only text."""
        return [i for part, options in self._stretches(marked) for i in self._ids(part, **options)]

    def _stretches(self, marked: str) -> Iterator[tuple[str, dict[str, bool]]]:
        """What is cut by itself, and how: between marks, and letter by letter where a unigram model has the name of a
        symbol as a piece too."""
        for n, part in enumerate(marked.split(_MARK)):
            options = {"split_special_tokens": True} if n % 2 == 1 else {}
            while options and len(part) > 1 and not self._symbol_ids.isdisjoint(self._ids(part, **options)):
                yield part[:1], options
                part = part[1:]
            if part:
                yield part, options

    def _ids(self, text: str, **options: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, **options)["input_ids"])

    def _adds_a_space(self) -> bool:
        """Llama-2's and Mistral's tokenizers put a space in front of every text."""
        pieces = self.tokenizer.convert_ids_to_tokens(self._ids("a")[:1])
        return any(piece.startswith(("\N{LOWER ONE EIGHTH BLOCK}", "Ġ")) for piece in pieces)
