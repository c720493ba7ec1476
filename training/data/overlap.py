"""Is what the student is judged on in what it is trained on? And is the raw text full of repetitions?

FoQA's contexts come from the Faroese Wikipedia, and so does most Faroese text: a model that has read the contexts as
raw text is not judged on what it can find in them. The rule: a context is in the training text where at least half of
its sequences of 13 words are (letter case and punctuation do not count); one of fewer words, where all of it is, in
this order. Raw texts are repeated, and questions are one, where they agree but for case and white space.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from configs.io.jsonl import iterate_jsonl, read_questions
from configs.prompts import as_text, render
from configs.schema import RunConfig
from training.experience import Prompt
from training.objective import pt_coef

WORDS = 13
"""Words in a sequence, as in GPT-3's check (arXiv 2005.14165, appendix C); fewer find turns of phrase."""
SHARE = 0.5
"""Share of a context's sequences from which it counts as read."""
_WORD = re.compile(r"\w+")


def overlap(contexts: Iterable[str], texts: Iterable[str]) -> tuple[list[str], int]:
    """Which contexts are in the texts, and of how many different ones. Memory: the contexts' sequences; the texts are
    read once."""
    unique = [context for context in dict.fromkeys(contexts) if _WORD.search(context)]
    sequences = [set(_sequences(_words(context), min(WORDS, len(_words(context))))) for context in unique]
    wanted = set[tuple[str, ...]]().union(*sequences)
    lengths = {len(sequence) for sequence in wanted}
    seen: set[tuple[str, ...]] = set()
    for text in texts:
        words = _words(text)
        for length in lengths:
            seen.update(s for s in _sequences(words, length) if s in wanted)
    hit = [context for context, own in zip(unique, sequences, strict=True) if len(own & seen) >= SHARE * len(own)]
    return hit, len(unique)


def repeated(texts: Iterable[str]) -> int:
    """Texts that occurred before."""
    seen: set[int] = set()
    count = 0
    for text in texts:
        key = hash(folded(text))
        count += key in seen
        seen.add(key)
    return count


def folded(text: str) -> str:
    """Lower case, single spaces: two texts that agree in this are one."""
    return " ".join(text.casefold().split())


def data_warnings(config: RunConfig, heldout: Sequence[Prompt], *, stage: int = 2) -> list[str]:
    """One line for each thing that is wrong with the files that stage 1 or 2 trains on; all paths are resolved."""
    lines, data = [], config.data
    from_teacher = stage == 1 and config.sft.answers == "teacher"
    questions = {"data.prompts": data.prompts} if stage == 2 or from_teacher else {}
    if (stage == 1 and not from_teacher) or config.loss.bc_coef > 0 or config.phases.every > 0:
        questions["data.warmup"] = data.warmup
    asked = {folded(prompt.text) for prompt in heldout}
    for key, path in questions.items():
        rows = read_questions(path, answers=False)
        if same := sum(folded(as_text(render(row, data.template))) in asked for row in rows):
            lines.append(
                f"{key} = {path!r}: {same} of its {len(rows)} questions are held-out ones, so the evaluation asks what "
                "was trained on; leave them out of one of the files"
            )
        lines += _found_line(key, path, heldout, (f"{row.get('context') or ''} {row['question']}" for row in rows))
    if stage == 2 and pt_coef(config) > 0 and data.text is not None:
        lines += _found_line("data.text", data.text, heldout, _texts(data.text))
        if not data.deduplicate and (again := repeated(_texts(data.text))):
            lines.append(
                f"data.text = {data.text!r}: {again} of its texts are repetitions; set data.deduplicate to leave them "
                "out"
            )
    return lines


def _found_line(key: str, path: str, heldout: Sequence[Prompt], texts: Iterable[str]) -> list[str]:
    """The warning of a file that has held-out contexts in it, or nothing."""
    found, count = overlap((prompt.context for prompt in heldout if prompt.context), texts)
    if not found:
        return []
    return [
        f"{key} = {path!r}: {len(found)} of {count} held-out contexts are in it (at least half of their "
        f"sequences of {WORDS} words), so the evaluation reads what was trained on; the first: {found[0][:80]!r}"
    ]


def _texts(path: str) -> Iterator[str]:
    return (str(row["text"]) for row in iterate_jsonl(path, ["text"]))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _sequences(words: Sequence[str], length: int) -> Iterable[tuple[str, ...]]:
    return (tuple(words[i : i + length]) for i in range(len(words) - length + 1))
