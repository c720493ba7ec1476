"""Types of numbers with a range, written beside the setting they belong to; configs/checks.py holds them to it.

jsonargparse.typing has types of these names, but its errors name neither the whole key in a list nor the mend, its
numbers cannot be written to YAML, and it does not see a configuration that Python code makes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Range:
    """Which numbers a setting takes."""

    holds: Callable[[float], bool]
    mend: str
    """What to do about any other."""


PositiveInt = Annotated[int, Range(lambda x: x >= 1, "must be at least 1")]
NonNegativeInt = Annotated[int, Range(lambda x: x >= 0, "must be at least 0")]
AtLeastTwo = Annotated[int, Range(lambda x: x >= 2, "must be at least 2")]
Seed = Annotated[int, Range(lambda x: abs(x) < 2**32, "must lie between -2**32 and 2**32, and be neither")]
PositiveFloat = Annotated[float, Range(lambda x: x > 0, "must be above 0")]
PositiveFinite = Annotated[float, Range(lambda x: 0 < x < math.inf, "must be above 0, and finite")]
NonNegativeFloat = Annotated[float, Range(lambda x: 0 <= x < math.inf, "must be at least 0, and finite")]
AtLeastOne = Annotated[float, Range(lambda x: x >= 1, "must be at least 1")]
Finite = Annotated[float, Range(math.isfinite, "must be a finite number")]
ClosedUnitInterval = Annotated[float, Range(lambda x: 0 <= x <= 1, "must lie between 0 and 1")]
OpenUnitInterval = Annotated[float, Range(lambda x: 0 < x < 1, "must lie between 0 and 1, and be neither")]
ZeroToBelowOne = Annotated[float, Range(lambda x: 0 <= x < 1, "must be at least 0 and below 1")]
