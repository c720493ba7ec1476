"""Files that are either whole or not there, and locks between processes."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import xxhash
import yaml

_BLOCK = 1 << 20
_SMALL = 1 << 24


def write_atomically(path: str | Path, content: str | bytes | Iterable[bytes]) -> None:
    """Write beside and rename, so that a reader or an interrupted run never meets half a file. Content that comes in
    pieces is not held in memory."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        content = content.encode()
    handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            out.writelines([content] if isinstance(content, bytes) else content)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(beside, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def parse_json(text: str, *, strict: bool = False) -> Any:
    """The value that a JSON text holds. ValueError where it is none, is nested too deep, or has a number of thousands
    of digits; `strict` (what people write) also where an object has a key twice, or a string half a character."""
    try:
        value = json.loads(text, object_pairs_hook=_unique if strict else None)
        if strict and "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError:
        raise ValueError("nested too deep") from None
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair (\\ud800 to \\udfff), which is no character") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of a key that is there twice one value would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a ValueError that names the file."""
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return value


class _Once(yaml.SafeLoader):
    """YAML whose mappings have each key once (of one that is there twice all but the last would be lost), and in which
    nothing holds itself (`&x [*x]`), which who reads it would go through for ever."""

    def construct_document(self, node: yaml.Node) -> Any:
        self.deep_construct = True  # what is inside first, so that it cannot hold what is not made yet
        return super().construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        if twice := [key for n, (key, _) in enumerate(node.value) if key.value in names[:n]]:
            line = twice[0].start_mark.line + 1
            raise yaml.YAMLError(f"line {line}: key {twice[0].value!r} is there twice; write it once, with all of both")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """What a YAML file holds, or a ValueError that names the file."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Once)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # a date that is none is a ValueError
        raise ValueError(f"{path}: {' '.join(str(error).split())[:300]}") from None


def fingerprint(path: str | Path, *, whole: bool = True) -> str:
    """What is in a file, or in all files of a folder (their names count, hidden ones do not); "" where there is none.

    With `whole` every byte is read, at the speed of the disk. Without, files above 16 MiB count by their size, the time
    of their last change, and the first and the last MiB: for weights, which are read often and replaced whole.
    """
    path = Path(path)
    folder = path.is_dir()
    names = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")) if folder else [path]
    digest = xxhash.xxh3_128()
    found = False
    for name in names:
        try:
            with name.open("rb", buffering=0) as file:
                state = os.fstat(file.fileno())
                part = not whole and state.st_size > _SMALL
                changed = state.st_mtime_ns if part else 0
                digest.update(f"{name.relative_to(path) if folder else ''} {state.st_size} {changed}\n".encode())
                while block := file.read(_BLOCK):
                    digest.update(block)
                    if part and file.tell() == len(block):
                        file.seek(-_BLOCK, os.SEEK_END)
            found = True
        except OSError:
            continue
    return digest.hexdigest() if found else ""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; the system drops it when the process ends, however it ends. Where the file
    system has no locks (Lustre without `flock`), processes of one machine wait for each other alone."""
    with ExitStack() as stack:
        try:
            fcntl.flock(stack.enter_context(path.open("w")), fcntl.LOCK_EX)
        except OSError:
            here = Path(tempfile.gettempdir(), f"grpo-kd-{xxhash.xxh3_64_hexdigest(bytes(path.resolve()))}.lock")
            fcntl.flock(stack.enter_context(here.open("w")), fcntl.LOCK_EX)
        yield
