"""Files of a checkpoint: written with a checksum and forced to disk, listed in a manifest."""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from configs.io.files import read_json, write_atomically

MANIFEST = "manifest.json"
FORMAT = 2
"""Of what a checkpoint consists; counted up when that changes. 2 is the first with its number in the manifest; files of
format 1 are the same, and are read."""


class UnknownFormat(ValueError):
    """A checkpoint of a later version of this program."""


@dataclass(frozen=True)
class Written:
    """What a file has to be."""

    size: int
    """Bytes."""
    xxh3: str
    """xxHash XXH3 of its content, 128 bits in hex. It finds damage, not malice, at memory speed."""


@dataclass(frozen=True)
class Manifest:
    """What a whole checkpoint consists of."""

    step: int
    """Steps that are done."""
    world_size: int
    """Trainer ranks that wrote it."""
    zero_stages: Mapping[str, int]
    """ZeRO stage of each engine, by the name of its folder."""
    versions: Mapping[str, str]
    """Versions of the libraries that wrote it."""
    files: Mapping[str, Written]
    """Every file, by its path below the checkpoint."""
    format: int = FORMAT

    def save(self, directory: Path) -> None:
        """Write it into the checkpoint, as the last of its files."""
        write_atomically(directory / MANIFEST, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Raises OSError or ValueError where it is missing or cannot be understood, UnknownFormat where too new."""
        try:
            values = read_json(directory / MANIFEST)
            if (format := values.get("format", 1)) > FORMAT:
                raise UnknownFormat(
                    f"{directory} is a checkpoint of format {format}, and this version reads {FORMAT} and older: go on "
                    "with the version that wrote it, or choose another --name"
                )
            return cls(**{**values, "files": {k: Written(**v) for k, v in values["files"].items()}, "format": format})
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{MANIFEST}: {error}") from None


class _HashedFile(io.BufferedWriter):
    """Hashes what passes, and keeps the first error, which torch.save replaces by one of its own."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.open("wb", buffering=0))
        self.digest = xxhash.xxh3_128()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.digest.update(data)
        try:
            return super().write(data)
        except OSError as error:
            self.error = self.error or error
            raise


def write_state(path: Path, state: Any) -> Written:
    """Write bytes as they are and everything else by torch.save, and force it to disk. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    checked = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # the zip archive's own checksum halves the speed
    try:
        with _HashedFile(path) as out:
            try:
                if isinstance(state, bytes):
                    out.write(state)
                else:
                    torch.save(state, out)
            except RuntimeError as error:
                raise (out.error or error) from None
            out.flush()
            os.fsync(out.fileno())
            return Written(out.tell(), out.digest.hexdigest())
    finally:
        torch.serialization.set_crc32_options(checked)


def sync(path: Path) -> None:
    """Force a file, or the names in a directory, to disk. Some network file systems refuse that for a directory, where
    they keep names at once."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


def wrong_size(directory: Path, files: Mapping[str, Written]) -> str | None:
    """The first file that is missing or of another size, in words; None where all are there. Reads no file."""
    for name, expected in files.items():
        try:
            size = (directory / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if size != expected.size:
            return f"{name} has {size} bytes in place of {expected.size}"
    return None
