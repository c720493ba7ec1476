"""Which words are Faroese: a Hunspell dictionary, read through spylls."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

HUNSPELL_FOLDERS = (Path("/usr/share/hunspell"), Path("/usr/share/myspell/dicts"))


def dictionary_path(name: str) -> Path:
    """Where the Hunspell dictionary is: `auto` looks for an installed Faroese one, else a path without .dic and .aff.

    Raises ValueError with the mend where it is not there.
    """
    places = [folder / code for folder in HUNSPELL_FOLDERS for code in ("fo_FO", "fo")]
    for place in places if name == "auto" else [Path(name)]:
        if all(place.with_name(f"{place.name}.{end}").is_file() for end in ("dic", "aff")):
            return place
    raise ValueError(
        f"rewards.language_dictionary = {name!r}: no such Hunspell dictionary; give a path without .dic and .aff, "
        "install one (Debian: myspell-fo), or leave it out"
    )


@lru_cache(maxsize=1)
def dictionary(name: str) -> Callable[[str], bool]:
    """A function that accepts the words of a Hunspell dictionary, read through spylls (some seconds, once)."""
    place = dictionary_path(name)
    try:
        from spylls.hunspell import Dictionary
    except ImportError:
        raise ValueError("rewards.language_dictionary needs the package spylls: pip install spylls") from None
    lookup = Dictionary.from_files(str(place)).lookup

    @lru_cache(maxsize=1 << 16)
    def accepts(word: str) -> bool:
        return bool(lookup(word) or lookup(word.capitalize()))  # the first word of an answer may be a name

    return accepts
