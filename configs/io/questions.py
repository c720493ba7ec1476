"""A question with its answers, in each layout in which people have them (docs/data.md shows one of each).

question, context, answers     our own; `answers` may be SQuAD's {"text": [...], "answer_start": [...]}
messages                       a chat; the assistant's last turn is the answer
prompt, completion             TRL's: two strings, or two lists of turns
instruction, input, output     Alpaca's; `input` is the context
"""

from __future__ import annotations

import json
from typing import Any

from configs.prompts import Turn

Row = dict[str, Any]
ANSWER = {"question": "answers", "messages": "messages", "prompt": "completion", "instruction": "output"}
"""What a row has the question under, and then the answer."""


def as_question(row: Row, *, answers: bool) -> Row:
    """The row with `question`, perhaps `context`, and `answers` where it has some. `prompt` is there where the question
    is asked as it stands and not through data.template: a text, or the turns of a conversation of several.

    Raises ValueError with the mend; `answers`: also where there is none.
    """
    kind = next((key for key in ANSWER if row.get(key) is not None), "question")
    if kind in ("messages", "prompt") and row.get("tools"):
        raise ValueError(
            "key 'tools': the model is told of none; leave the row out, or its tools where they do not matter"
        )
    found = {key: value for key, value in row.items() if key not in ("messages", "prompt")}
    said: Any = None
    if kind == "instruction":
        found["question"], found["context"], said = row[kind], row.get("input") or None, row.get("output")
    elif kind != "question":
        turns = row[kind] if kind == "prompt" and isinstance(row[kind], str) else _turns(kind, row[kind])
        if kind == "prompt":
            said = row.get("completion")
            said = said if said is None or isinstance(said, str) else _answer("completion", said)
        elif turns[-1]["role"] == "assistant":
            turns, said = turns[:-1], turns[-1]["content"]
        found |= _asked(kind, turns)
    if kind != "question":
        _require_text(kind, found["question"])
    accepted = row.get("answers")
    if isinstance(accepted, dict) and "text" in accepted:
        accepted = accepted["text"]
    if accepted is None and said not in (None, ""):
        _require_text(ANSWER[kind], said)
        accepted = [said]
    if accepted is None:
        if answers and kind != "question":
            mend = "end it with a turn of the assistant" if kind == "messages" else f"give it a key {ANSWER[kind]!r}"
            raise ValueError(f"the row with the key {kind!r} has no answer; {mend}")
        return found
    if not isinstance(accepted, list) or not all(isinstance(answer, str) and answer.strip() for answer in accepted):
        raise ValueError(f"key 'answers' is {_shown(accepted)}; write a list of strings")
    return found | {"answers": list(dict.fromkeys(accepted))}


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)[:80]


def _require_text(key: str, value: Any) -> None:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"key {key!r} is {_shown(value)}; write a text")


def _asked(key: str, turns: str | list[Turn]) -> Row:
    """`question` and `prompt`. A single turn of the user is the text alone, for chat and plain models alike."""
    if not isinstance(turns, str) and [turn["role"] for turn in turns] == ["user"]:
        turns = turns[0]["content"]
    if isinstance(turns, str):
        return {"question": turns, "prompt": turns}
    if not turns or turns[-1]["role"] == "assistant":
        raise ValueError(f"key {key!r} asks nothing; let a turn of the user stand before the answer")
    return {"question": turns[-1]["content"], "prompt": turns}


def _answer(key: str, value: Any) -> str:
    turns = _turns(key, value)
    if [turn["role"] for turn in turns] != ["assistant"]:
        raise ValueError(f"key {key!r} is {len(turns)} turns; write one, whose role is assistant")
    return turns[0]["content"]


def _turns(key: str, value: Any) -> list[Turn]:
    """The turns of a chat, their role and content alone."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"key {key!r} is a {type(value).__name__}; write a list of {{role, content}}")
    for turn in value:
        if isinstance(turn, dict) and turn.get("tool_calls"):
            raise ValueError(f"key {key!r} has a turn with tool_calls, which are not read; leave the row out")
        if not isinstance(turn, dict) or not all(
            isinstance(turn.get(part), str) and turn[part].strip() for part in ("role", "content")
        ):
            raise ValueError(f"key {key!r} has the turn {_shown(turn)}; write a role and a content, both strings")
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]
