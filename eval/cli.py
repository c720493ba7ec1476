"""What the programs of this folder share: a parser, and a user's mistake told in one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from configs.schema import RunConfig


def parser_of(doc: str | None, *, runs_dir: bool = True) -> argparse.ArgumentParser:
    """A parser whose help is the program's docstring; with --runs_dir for those that look for models or results."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    if runs_dir:
        parser.add_argument("--runs_dir", type=Path, default=Path(RunConfig().runs_dir), help="folder of all runs")
    return parser


def exit_code(command: Callable[[], object]) -> int:
    """The number that the command gives back, 0 for anything else; 2, and one line that says what to mend, where it
    raises ValueError or OSError."""
    try:
        found = command()
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return found if isinstance(found, int) else 0
