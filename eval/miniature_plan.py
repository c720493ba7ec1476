"""What configs/miniature.yaml says. No torch."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from eval.plan_parts import chosen, flags

ROOT = Path(__file__).resolve().parent.parent
PLAN_FILE = ROOT / "configs" / "miniature.yaml"
BASE = ROOT / "configs" / "gemma3_270m_smollm2_135m.yaml"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train the student."""

    name: str
    """Also the name of its run folder."""
    program: str
    """The script that trains it, from the repository root."""
    what: str
    """One line."""
    settings: Mapping[str, Any] = field(hash=False)
    """Keys of the script's command line with their values."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """configs/miniature.yaml."""

    heldout: int
    """Sentences kept out of all training."""
    opening_words: int
    """First words of a sentence that make a prompt."""
    questions: int
    """Held-out openings of stage 2's own evaluation."""
    batch: int
    """Sentences in a forward pass of the measurement."""
    common: Mapping[str, Any]
    """Settings of all arms."""
    arms: Sequence[Arm]

    @property
    def seed(self) -> int:
        """Of the split, the mistakes and the runs."""
        return int(self.common["seed"])

    def chosen(self, names: Sequence[str] | None) -> list[Arm]:
        """The arms of these names, in the plan's order; None: all. ValueError where there is no such name."""
        return chosen(self.arms, names, "arm")


def read_plan(path: Path = PLAN_FILE) -> Plan:
    """The plan; ValueError where the file does not hold one."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        plan = Plan(**{**values, "arms": [Arm(**row) for row in values["arms"]]})
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a plan of the miniature ({' '.join(str(error).split())})") from None
    return plan


def arguments(plan: Plan, arm: Arm, paths: Mapping[str, Path]) -> list[str]:
    """The command line of an arm's program, without its name. A prompt is the opening itself."""
    values: dict[str, Any] = {
        "data.template": "{question}",
        "eval.questions": plan.questions,
        **{key: str(path) for key, path in paths.items()},
        **plan.common,
        **arm.settings,
    }
    return ["--config", str(BASE), *flags(values)]


def split(sentences: Sequence[str], heldout: int, seed: int) -> tuple[list[str], list[str]]:
    """(training sentences, held-out ones): repeated sentences left out, the held-out ones drawn by seed.

    Raises ValueError where as many sentences are to be held out as there are.
    """
    unique = list(dict.fromkeys(" ".join(sentence.split()) for sentence in sentences))
    if heldout >= len(unique):
        raise ValueError(f"heldout = {heldout}: the text has {len(unique)} sentences; give more text, or hold out less")
    chosen = set(random.Random(seed).sample(range(len(unique)), heldout))
    return (
        [sentence for i, sentence in enumerate(unique) if i not in chosen],
        [sentence for i, sentence in enumerate(unique) if i in chosen],
    )
