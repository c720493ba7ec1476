"""The one format of a measurement: what was measured of which model, on what, how, and what came out.

Every measurement writes one JSON file of it, training's own evaluations as well as eval/'s measures, and every page and
table reads only this. runs/NAME/eval/ holds those of a run and its export.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from configs.io.files import read_json, write_atomically
from configs.io.tables import content

FORMAT = 1
HELDOUT = {
    "f1": ("F1, %", "F1", 1),
    "exact_match": ("Exact match, %", "exact", 1),
    "reverse_kl": ("Reverse KL, nats a token", "reverse KL", 3),
    "open_right": ("Open: right, %", "open right", 1),
    "open_different": ("Open: right and different, %", "different", 1),
    "open_kl": ("Open: reverse KL", "open KL", 3),
}
"""What is measured on held-out questions: its title, a heading for narrow columns, and its digits. A KL is better low,
everything else high."""


@dataclass(frozen=True)
class Value:
    """A number with its 95 % interval; `low` and `high` are None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """One measurement of one model."""

    measure: str
    """Name of the measure."""
    model: str
    """Model directory or hub id, as the user called it."""
    data: Mapping[str, Any]
    """path, sha256 and rows of what it was measured on, and of how many rows there those are; by name where that is
    several."""
    settings: Mapping[str, Any]
    """How it was measured. Results compare where data and settings are equal."""
    versions: Mapping[str, str]
    """Of the packages that measured."""
    values: Mapping[str, Value]
    """The numbers by name."""
    rows: Sequence[Mapping[str, Any]] = ()
    """What the numbers are made of, one example each."""

    @property
    def numbers(self) -> dict[str, float]:
        """The values without their intervals."""
        return {name: one.value for name, one in self.values.items()}

    def write(self, path: str | Path) -> None:
        """Write the file, whole or not at all. A value that is not finite is null in it."""
        content = json.dumps({"format": FORMAT, **_finite(asdict(self))}, ensure_ascii=False, indent=1, allow_nan=False)
        write_atomically(path, content + "\n")


def read_result(path: str | Path) -> Result:
    """The result that a file holds. Raises ValueError, naming file and mend, where it is none."""
    try:
        content = read_json(Path(path))
        if content.pop("format") != FORMAT:
            raise ValueError("another format")
        values = {name: Value(**{**one, "value": _number(one["value"])}) for name, one in content["values"].items()}
        return Result(**{**content, "values": values})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{path}: not a result of format {FORMAT} ({reason}); delete it and measure again") from None


def find_result(path: Path) -> Result | None:
    """The same; None where there is no file."""
    return read_result(path) if path.is_file() else None


def about_file(path: Path, rows: int, of: int) -> dict[str, Any]:
    """`data` of a result: path, SHA-256 (of a folder or data set: of its fingerprint), rows used and `of` how many."""
    read = path.read_bytes() if path.is_file() else content(path).encode()
    return {"path": str(path), "sha256": hashlib.sha256(read).hexdigest(), "rows": rows, "of": of}


def versions(*packages: str) -> Mapping[str, str]:
    """`versions` of a result."""
    return {package: version(package) for package in packages}


def _finite(value: Any) -> Any:
    """Without numbers that JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and value - value != 0 else value


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
