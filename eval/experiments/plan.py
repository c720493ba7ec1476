"""What the YAML of an experiment says: variants, seeds, and what is measured. No torch."""

from __future__ import annotations

import json
import operator
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from configs.io.files import read_json, read_yaml

ROOT = Path(__file__).resolve().parents[2]
"""The repository: the working directory of every run."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to train."""

    name: str
    """Also the start of the names of its run folders."""
    what: str
    """One line."""
    settings: Mapping[str, Any] = field(hash=False)
    """Keys of the program's command line with their values."""
    group: str = ""
    """Key of `Plan.groups`."""
    program: str = "training/main.py"
    """The script that trains it, from the repository root."""
    against: str = ""
    """Name of the variant that it is compared with, seed by seed; empty: `Plan.whole`."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A number of the table: of the trainer's evaluation (f1, exact_match, reverse_kl), or a value of a measure."""

    title: str
    digits: int
    better: Literal["higher", "lower"]


@dataclass(frozen=True)
class Task:
    """One run."""

    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return f"{self.variant.name}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The file. `${NAME}` in it stands for what `--with NAME=VALUE` gives, `${runs}` for the folder of the runs,
    `${cache}` for that of the demo, and under `measures` also for a setting of the runs: `${data.prompts}`."""

    seeds: Sequence[int]
    variants: Sequence[Variant]
    columns: Mapping[str, Column]
    """By the value's name."""
    common: Mapping[str, Any] = field(default_factory=dict)
    """Settings of all variants."""
    groups: Mapping[str, str] = field(default_factory=lambda: {"": "Variants"})
    """Heading by key."""
    whole: str = ""
    """Name of the variant that those without `against` are compared with."""
    prepare: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Command (a script of ours and its arguments) by the file that it makes; left out where the file is there."""
    measures: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Options of eval/measure.py by name of the measure."""

    def chosen(self, names: Sequence[str] | None) -> list[Variant]:
        """The variants of these names, in the plan's order; None: all. ValueError where there is no such name."""
        have = [one.name for one in self.variants]
        if wrong := [name for name in names or [] if name not in have]:
            raise ValueError(f"--only {' '.join(wrong)}: no such variant; there are {', '.join(have)}")
        return [one for one in self.variants if names is None or one.name in names]

    def arguments(self, variant: Variant, given: Mapping[str, Any], steps: int | None = None) -> list[str]:
        """The command line of its program, without name, folders and seed. ValueError where `given` lacks a name."""
        return filled(flags(self._settings(variant, steps)), given)

    def steps(self, variant: Variant, steps: int | None) -> int | None:
        """Optimizer steps of a finished run of it; None where neither plan nor command line says."""
        found = self._settings(variant, steps).get(_steps_key(variant))
        return None if found is None else int(found)

    def _settings(self, variant: Variant, steps: int | None) -> dict[str, Any]:
        asked = {} if steps is None else {_steps_key(variant): steps}
        return {**self.common, **variant.settings, **asked}


def _steps_key(variant: Variant) -> str:
    return "steps" if variant.program.endswith("main.py") else "sft.steps"


class _Template(string.Template):
    idpattern = r"(?a:[_a-z][_a-z0-9.]*)"


def filled(words: Sequence[str], given: Mapping[str, Any]) -> list[str]:
    """The words with each `${NAME}` replaced; a word that is only the name of a setting without a value falls."""
    try:
        found = [_Template(word).substitute({k: "" if v is None else v for k, v in given.items()}) for word in words]
    except KeyError as error:
        raise ValueError(f"the plan asks for ${{{error.args[0]}}}: give --with {error.args[0]}=VALUE") from None
    return [new for new, word in zip(found, words, strict=True) if new or not re.fullmatch(r"\$\{.*\}", word)]


def flags(values: Mapping[str, Any], lists: bool = False) -> list[str]:
    """Settings as words of the command line, a key and its value each; YAML's values as YAML writes them. `lists`: a
    list is several words."""
    words = []
    for key, value in values.items():
        each = value if lists and isinstance(value, list) else [value]
        words += [f"--{key}", *(one if isinstance(one, str) else json.dumps(one) for one in each)]
    return words


def read_plan(path: Path) -> Plan:
    """The plan; ValueError where the file does not hold one."""
    try:
        values = {key: value for key, value in read_yaml(path).items() if value is not None}  # nothing stands below it
        columns = {name: Column(**row) for name, row in values["columns"].items()}
        variants = [Variant(**{**row, "settings": row["settings"] or {}}) for row in values["variants"]]
        measures = {name: dict(options or {}) for name, options in (values.get("measures") or {}).items()}
        plan = Plan(**{**values, "variants": variants, "columns": columns, "measures": measures})
        seeds = [operator.index(seed) for seed in plan.seeds]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not the plan of an experiment ({' '.join(str(error).split())})") from None
    if not seeds:
        raise ValueError(f"{path}: seeds is empty; write a list of whole numbers")
    names = [variant.name for variant in variants]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: two variants have the same name")
    if unknown := {variant.group for variant in variants} - set(plan.groups):
        raise ValueError(f"{path}: no heading for the groups {', '.join(sorted(unknown))}")
    named = {"whole": plan.whole} | {f"against of {one.name}": one.against for one in variants}
    for key, name in named.items():
        if name and name not in names:
            raise ValueError(f"{path}: {key} = {name!r}: no such variant; there are {', '.join(names)}")
    if measures:  # what knows them takes a second to import
        _check_measures(path, measures)
    return plan


def _check_measures(path: Path, measures: Mapping[str, Mapping[str, Any]]) -> None:
    """Names of measures and of their options, before the first run: they are measured behind the last one."""
    from eval.measure import settings_of
    from eval.measures import MEASURES

    for name, options in measures.items():
        if name not in MEASURES:
            raise ValueError(f"{path}: measures: {name!r}: no such measure; there are {', '.join(MEASURES)}")
        known = {one.name: one for one in fields(settings_of(MEASURES[name]))}
        if wrong := [key for key in options if key not in (*known, "dtype")]:
            raise ValueError(f"{path}: measures: {name}: no option {wrong[0]!r}; there are dtype, {', '.join(known)}")
        needed = [key for key, one in known.items() if one.default is MISSING and one.default_factory is MISSING]
        if missing := [key for key in needed if key not in options]:
            raise ValueError(f"{path}: measures: {name} needs {', '.join(missing)}")


def summary_of(run: Path) -> dict[str, Any] | None:
    """summary.json of a run that is finished, else None."""
    path = run / "summary.json"
    if not path.is_file():
        return None
    summary = read_json(path)
    return summary if summary.get("status") == "finished" else None


def models_of(run: Path) -> dict[str, str]:
    """Model directory by stage: where the run began, what it made, its teacher. A relative one is as the run saw it,
    from the repository."""
    config = read_yaml(run / "config.yaml")
    start, teacher = (config[who]["path"] for who in ("student", "teacher"))
    found = {"start": start, "after": str(run / "export"), "teacher": teacher}
    return {stage: str(ROOT / path) if (ROOT / path).is_dir() else path for stage, path in found.items()}
