"""What configs/ablation.yaml says, and what the run folders of an ablation hold. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from eval.plan_parts import chosen, flags

PLAN_FILE = Path(__file__).resolve().parent.parent / "configs" / "ablation.yaml"
MEASURED = "eval/language.json"
"""Where eval/ablation.py puts bits a byte and the language rate of a run's student."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to train."""

    name: str
    """Also the start of the names of its run folders."""
    group: str
    """Key of `Plan.groups`."""
    what: str
    """One line."""
    settings: Mapping[str, Any] = field(hash=False)
    """Keys of the command line of training/main.py with their values."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """configs/ablation.yaml."""

    seeds: Sequence[int]
    common: Mapping[str, Any]
    """Settings of all variants."""
    groups: Mapping[str, str]
    """Heading by key."""
    variants: Sequence[Variant]

    def chosen(self, names: Sequence[str] | None) -> list[Variant]:
        """The variants of these names, in the plan's order; None: all. ValueError where there is no such name."""
        return chosen(self.variants, names, "variant")

    def arguments(self, variant: Variant) -> list[str]:
        """The command line of training/main.py, without name, folders and seed."""
        return flags({**self.common, **variant.settings})


@dataclass(frozen=True)
class Task:
    """One run."""

    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return f"{self.variant.name}-seed{self.seed}"


def read_plan(path: Path = PLAN_FILE) -> Plan:
    """The plan; ValueError where the file does not hold one."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        variants = [Variant(**row) for row in values["variants"]]
        plan = Plan(seeds=values["seeds"], common=values["common"], groups=values["groups"], variants=variants)
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a plan of an ablation ({' '.join(str(error).split())})") from None
    names = [variant.name for variant in variants]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: two variants have the same name")
    if unknown := {variant.group for variant in variants} - set(plan.groups):
        raise ValueError(f"{path}: no heading for the groups {', '.join(sorted(unknown))}")
    return plan


def summary_of(run: Path) -> dict[str, Any] | None:
    """summary.json of a run that is finished, else None."""
    path = run / "summary.json"
    if not path.is_file():
        return None
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return summary if summary.get("status") == "finished" else None


def is_finished(run: Path, steps: int) -> bool:
    """Whether a run has done all its steps (training/main.py decides in the same way)."""
    summary = summary_of(run)
    return summary is not None and (summary["steps"] >= steps or bool(summary.get("kl_limit_reached")))


def run_config(run: Path) -> dict[str, Any]:
    """config.yaml of a run: nested settings with the paths that were really read."""
    values: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    return values
