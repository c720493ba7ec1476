"""What a run writes to its terminal or log."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from typing import Any, TextIO

from transformers.utils import logging as transformers_logging


def quiet_logging() -> None:
    """Our own messages in one line each; libraries only when something is wrong. No message ends a run."""
    sys.stdout, sys.stderr = Unfailing(sys.stdout), Unfailing(sys.stderr)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", force=True)
    logging.getLogger("training").setLevel(logging.INFO)
    warnings.simplefilter("ignore", FutureWarning)  # libraries about each other
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it; it warns of kernels for four bits
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


class Unfailing:
    """A stream whose errors are nobody's: a log on a full disk, or a pipe that nobody reads any more, ends no run."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As the stream; what cannot be written is lost."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
