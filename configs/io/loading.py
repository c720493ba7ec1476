"""Loading large libraries in less time."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading() -> Iterator[None]:
    """A context for imports: what they make stays, so nobody looks through it for garbage, neither now nor later.

    torch and transformers make half a million objects, and looking through them again and again was a fifth of the time
    to import them. Load no model in here: garbage is kept too.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
