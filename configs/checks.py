"""Checks that the values of a configuration alone decide. A check never changes a value."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from configs.models import DEMO
from configs.ranges import Range

if TYPE_CHECKING:
    from configs.schema import RunConfig


def require(condition: bool, key: str, value: object, mend: str) -> None:
    """Raise a ValueError that names the key, the value and the mend unless `condition` holds."""
    if not condition:
        raise ValueError(f"{key} = {value!r}: {mend}")


def names_setting(config: RunConfig, error: ValueError) -> bool:
    """Whether an error is about a setting of the run, as those of `require` are: a mistake in the input, no fault."""
    named = re.match(r"([\w.]+)(\[\d+\][\w.]*)?( =|:)", str(error))
    try:
        attrgetter(named[1] if named else "")(config)
    except AttributeError:
        return False
    return True


def check_ranges(config: Any, prefix: str = "") -> None:
    """Check every number and every choice of a configuration dataclass and of those in it. Raises ValueError."""
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value, key = getattr(config, name), prefix + name
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{key}.")
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for place, item in enumerate(value):
                check_ranges(item, f"{key}[{place}].")
        elif value is None:
            require(hint is Any or type(None) in get_args(hint), key, None, "give it a value, or leave it out")
        else:
            values = value if isinstance(value, tuple) else (value,)
            for part in (hint, *get_args(hint)):  # the type itself, or one of `type | None` or `tuple[type, ...]`
                if get_origin(part) is Literal:
                    mend = f"use {', '.join(map(str, get_args(part)))}"
                    require(all(one in get_args(part) for one in values), key, value, mend)
                for metadata in getattr(part, "__metadata__", ()):
                    if isinstance(metadata, Range):
                        require(all(map(metadata.holds, values)), key, value, metadata.mend)


def validate(config: RunConfig) -> None:
    """Check everything that the values alone decide: each value by itself, then what goes together. Raises ValueError
    naming key, value and mend."""
    check_ranges(config)
    check_rules(config, _rules(config))
    try:
        re.compile(config.rewards.format_pattern)
    except (re.error, RecursionError, OverflowError) as error:
        require(False, "rewards.format_pattern", config.rewards.format_pattern, f"is no regular expression: {error}")
    names = [teacher.name for teacher in config.teachers]
    for i, name in enumerate(names):
        named = bool(re.fullmatch(r"[\w.-]+", name)) and name not in names[:i]
        require(named, f"teachers[{i}].name", name, "give each its own name of letters, digits, `.`, `_` and `-`")
        path = config.teachers[i].path
        mend = "name its model: the demo's teacher goes with the demo alone"
        require(path != DEMO or config.teacher.path == DEMO, f"teachers[{i}].path", path, mend)


def is_folder_name(name: str) -> bool:
    """Whether a folder can be called so, and be shown: no path, no line breaks, no characters that show nothing."""
    return "/" not in name and name.strip() == name and name not in ("", ".", "..") and name.isprintable()


def check_rules(config: RunConfig, rules: Iterable[tuple[str, bool, str]]) -> None:
    """`rules`: (key, whether its value goes with the others, the mend). Raises ValueError for one that does not."""
    for key, holds, mend in rules:
        require(holds, key, attrgetter(key)(config), mend)


def _rules(config: RunConfig) -> Iterator[tuple[str, bool, str]]:
    """What goes together."""
    named = config.name is None or is_folder_name(config.name)
    yield "name", named, "must be a plain folder name, in one line; choose the parent with runs_dir"
    for key in ("runs_dir", "cache_dir", "sft.output"):
        unread = re.match(r"~|.*\$[A-Za-z{]", str(attrgetter(key)(config)))
        yield key, unread is None, "write the whole path: `~` or `$NAME` would be a folder of that name"
    updates, teacher_s = config.actor.updates_per_rollout, config.teacher.timeout_s
    mend = f"must be a multiple of actor.updates_per_rollout ({updates})"
    yield "prompts_per_step", config.prompts_per_step % updates == 0, mend
    mend = f"must be above teacher.timeout_s ({teacher_s:g}), which a rank may wait for"
    yield "stuck_timeout_s", config.stuck_timeout_s > teacher_s, mend
    adapter, repository = config.student.adapter, config.export.push_to_hub or "owner/name"
    mend = "4-bit weights are frozen: set student.adapter.rank (16 is usual), which is what is trained then"
    yield "student.adapter.four_bit", not adapter.four_bit or adapter.rank > 0, mend
    mend = "takes the student's place at the end, which 4-bit weights cannot give up: leave out one of the two"
    yield "eval.baseline", config.eval.baseline is None or not adapter.four_bit, mend
    mend = "name a repository of the hub as owner/name"
    yield "export.push_to_hub", bool(re.fullmatch(r"[\w.-]+/[\w.-]+", repository)), mend
    validates, mend = config.eval.every > 0, "needs validations in the loop: set eval.every"
    yield "eval.patience", validates or config.eval.patience == 0, mend
    yield "eval.export", validates or config.eval.export == "last", mend
    yield "data.validation", validates or config.data.validation is None, mend
    slots = {
        "data.template": "{question}",
        "rewards.bilingual.instruction": "{text}",
        "rewards.bilingual.template": "{question}",
    }
    for key, slot in slots.items():
        yield key, slot in attrgetter(key)(config), f"must contain {slot}"
        without = slot == "{text}" or "{context}" not in attrgetter(key)(config)
        yield key, without, "a row's context stands before it in a line of its own, so leave {context} out"
    broken = (
        "\\n is a backslash and an n there; for a line break write it between double quotes in YAML, as $'...' in bash"
    )
    for key in (*slots, "student.system_prompt", "teacher.system_prompt"):
        yield key, "\\n" not in (attrgetter(key)(config) or ""), broken
    mend = "its greedy answers to a prompt are all one: set distill.answer_temperature (1 is usual), or leave it at 1"
    asks = config.sft.answers == "teacher" and config.distill.answer_temperature == 0
    yield "sft.samples", config.sft.samples == 1 or not asks, mend
    sampling, loss, rewards = config.sampling, config.loss, config.rewards
    mend = "sampling.teacher_mix mixes the two models' distributions at temperature 1"
    yield "sampling.temperature", sampling.teacher_mix == 0 or sampling.temperature == 1, mend
    mend = "measures gradients outside DeepSpeed's own pass, which ZeRO 3 does not allow: set it to 0, or "
    measurable = loss.gradient_shares_every == 0 or config.actor.zero_stage < 3
    yield "loss.gradient_shares_every", measurable, f"{mend}actor.zero_stage to 2"
    mend = "needs raw text: set data.text to a JSONL file with a `text` in each row"
    yield "loss.pt_coef", not loss.pt_coef or config.data.text is not None, mend
    mend = f"must be at least rewards.length_min_words ({rewards.length_min_words})"
    yield "rewards.length_max_words", rewards.length_max_words >= rewards.length_min_words, mend
    translated = rewards.bilingual_weight == 0 or rewards.bilingual.path is not None
    yield "rewards.bilingual.path", translated, "name the model that translates, or set rewards.bilingual_weight to 0"
    judged = rewards.judge_weight == 0 or rewards.judge.model is not None
    yield "rewards.judge.model", judged, "name the model that judges, or set rewards.judge_weight to 0"
