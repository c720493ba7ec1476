"""The questions of the validation in the loop: those of `data.validation`, or a few RL prompts that are set aside.

They are never the held-out ones, and none that is trained on.
"""

from __future__ import annotations

from collections.abc import Sequence

from configs.checks import require
from configs.schema import RunConfig
from training.data.overlap import folded
from training.experience import Prompt


def set_aside(
    prompts: Sequence[Prompt], heldout: Sequence[Prompt], config: RunConfig
) -> tuple[list[Prompt], list[Prompt]]:
    """`eval.validation_questions` of the RL prompts, evenly spaced over the file, none of them a held-out question; and
    all other prompts, without repetitions of those. Raises ValueError."""
    asked = {question_key(prompt) for prompt in heldout}
    needs_answers = config.eval.metric != "reverse_kl"
    fit = [p for p in prompts if question_key(p) not in asked and (p.answers or not needs_answers)]
    count = config.eval.validation_questions
    with_answers = f" with answers (eval.metric = {config.eval.metric!r} needs them)" if needs_answers else ""
    mend = f"{with_answers}; set fewer aside, or give a file in data.validation"
    more = f"is more than half of the {len(fit)} RL prompts{mend}"
    require(count <= len(fit) // 2, "eval.validation_questions", count, more)
    chosen = [fit[len(fit) * i // count] for i in range(count)]
    taken = {question_key(prompt) for prompt in chosen}
    return chosen, [prompt for prompt in prompts if question_key(prompt) not in taken]


def check_validation(validation: Sequence[Prompt], others: dict[str, Sequence[Prompt]], config: RunConfig) -> None:
    """Questions of `data.validation` are in no other file. `others`: by key. Raises ValueError."""
    keys = {question_key(prompt): prompt for prompt in validation}
    for name, prompts in others.items():
        shared = [keys[key] for key in dict.fromkeys(question_key(prompt) for prompt in prompts) if key in keys]
        if shared:
            raise ValueError(
                f"data.validation = {config.data.validation!r}: {len(shared)} of {len(keys)} questions are in {name} "
                f"too, the first: {shared[0].question[:80]!r}; leave them out there, or leave data.validation out to "
                "have RL prompts set aside"
            )


def question_key(prompt: Prompt) -> str:
    """What makes two questions one, but for case and white space: context and turns before it count."""
    return folded(prompt.text)
