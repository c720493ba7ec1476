"""What the plans of experiments share: choosing variants by name, settings as a command line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar


class Named(Protocol):
    """One way to train."""

    @property
    def name(self) -> str:
        """What `--only` calls it."""
        ...


T = TypeVar("T", bound=Named)


def chosen(known: Sequence[T], names: Sequence[str] | None, kind: str) -> list[T]:
    """Those of these names, in the plan's order; None: all. ValueError where there is no such `kind`."""
    have = [one.name for one in known]
    if wrong := [name for name in names or [] if name not in have]:
        raise ValueError(f"--only {' '.join(wrong)}: no such {kind}; there are {', '.join(have)}")
    return [one for one in known if names is None or one.name in names]


def flags(values: Mapping[str, Any]) -> list[str]:
    """Settings as words of the command line, a key and its value each; YAML's values as YAML writes them."""
    return [
        word
        for key, value in values.items()
        for word in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
    ]
