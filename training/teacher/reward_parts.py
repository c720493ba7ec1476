"""The extra parts of the reward, as configured: those of rewards/parts, LLM-as-a-judge, and a user's own function."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from configs.checks import require
from configs.schema import RunConfig
from inference.model.files import safetensors_files
from rewards.base import RewardInput
from rewards.parts import PARTS, part_weights
from rewards.parts.dictionary import dictionary
from training import distributed
from training.run.stopping import RunFailed


def configured_parts(inputs: RewardInput, config: RunConfig) -> dict[str, torch.Tensor]:
    """float32 [B] (or [S]) values of every part that counts, unweighted; `bilingual` is
    training/teacher/bilingual.py's.

    The judge asks its endpoint (cached in config.cache_dir); the rest is pure.
    """
    parts: dict[str, Callable[[], Sequence[float]]] = {
        **{name: partial(part, inputs, config.rewards) for name, part in PARTS.items()},
        "judge": lambda: _judged(inputs, config),
        "custom": lambda: _custom(inputs, str(config.rewards.custom)),
    }
    weights = part_weights(config.rewards)
    return {name: torch.tensor(values(), dtype=torch.float32) for name, values in parts.items() if name in weights}


def _judged(inputs: RewardInput, config: RunConfig) -> list[float]:
    """The judge's scores; a response whose score could not be had gets the mean of the others in its group."""
    from training.teacher.api_teacher import judge_of, marks

    pairs = list(zip(inputs.questions_B, inputs.texts_B, strict=True))
    judge = judge_of(config.rewards.judge, config.cache_dir)
    judge.on_reply = distributed.beat  # a slow endpoint is not a stuck rank
    scores = marks(judge, pairs)
    out: list[float] = []
    for first in range(0, len(scores), inputs.group_size):
        group = scores[first : first + inputs.group_size]
        known = [score for score in group if score is not None]
        mean = sum(known) / len(known) if known else 0.5
        out += [mean if score is None else score for score in group]
    return out


def _custom(inputs: RewardInput, name: str) -> Sequence[float]:
    """Raises RunFailed, in one line, for whatever the user's function does wrong."""
    try:
        values = [float(value) for value in custom_function(name)(inputs)]
    except Exception as error:  # whatever the user's function raises
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise RunFailed(f"rewards.custom = {name!r}: it raised {message}") from error
    if len(values) not in (len(inputs.lengths_B), int(inputs.lengths_B.sum())):
        raise RunFailed(
            f"rewards.custom = {name!r}: it returned {len(values)} numbers for {len(inputs.lengths_B)} responses of "
            f"{int(inputs.lengths_B.sum())} tokens; return one for each response, or one for each token"
        )
    for i, value in enumerate(values):
        if not abs(value) <= torch.finfo(torch.float32).max:
            raise RunFailed(f"rewards.custom = {name!r}: number {i} of {len(values)} is {value}; return finite numbers")
    return values


@lru_cache(maxsize=4)
def custom_function(name: str) -> Callable[[RewardInput], Any]:
    """The function that `FILE:FUNCTION` names. Raises ValueError where there is none."""
    path, _, function = name.rpartition(":")
    file = Path(path)
    require(bool(path) and function.isidentifier(), "rewards.custom", name, "must be FILE.py:FUNCTION")
    require(file.is_file(), "rewards.custom", name, f"no file {path}")
    spec = importlib.util.spec_from_file_location(f"grpo_kd_custom_{file.stem}", file)
    require(spec is not None, "rewards.custom", name, "must be a Python file (.py)")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a dataclass in the file looks its module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"rewards.custom = {name!r}: {path} cannot be imported ({message})") from error
    found = getattr(module, function, None)
    require(callable(found), "rewards.custom", name, f"{path} has no function {function}")
    assert found is not None
    return found


def check_extra_rewards(config: RunConfig) -> None:
    """What the parts need from outside, before any model is loaded. Raises ValueError with the mend."""
    weights, rewards = part_weights(config.rewards), config.rewards
    if "language" in weights and rewards.language_dictionary is not None:
        dictionary(rewards.language_dictionary)
    if "custom" in weights:
        custom_function(str(rewards.custom))
    if "bilingual" in weights:
        path = Path(str(rewards.bilingual.path))
        require((path / "config.json").is_file(), "rewards.bilingual.path", str(path), "no model directory")
        files = "no model.safetensors in it, nor an index of its shards; save it with save_pretrained"
        require(bool(safetensors_files(path)), "rewards.bilingual.path", str(path), files)
    if "judge" in weights:
        from training.teacher.api_teacher import check_access

        check_access()
