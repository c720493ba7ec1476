"""Loading large libraries in less time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading() -> Iterator[None]:
    """A context for imports. What they make stays, so nobody looks through it for garbage, neither now nor later.

    torch and transformers make half a million objects; the collector would look through all of them again and again,
    which is a quarter of what importing them takes, and pauses in the steps after. Load no model in here: what is
    garbage at the end is kept too.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
