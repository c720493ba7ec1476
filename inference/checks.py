"""Is this directory a teacher that so many processes can serve? Answered from file names and config.json alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from inference.families import parse_architecture


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a ValueError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return value


def safetensors_files(path: Path) -> list[Path]:
    """The checkpoint's files; several where it is sharded."""
    return sorted(path.glob("*.safetensors"))


def check_teacher(path: Path, tensor_parallel: int, key: str = "teacher") -> None:
    """Raise a ValueError unless `path` holds a supported model whose heads `tensor_parallel` divides. `key`: whose
    settings they are, for the message."""
    if not path.is_dir():
        raise ValueError(f"{key}.path = {str(path)!r}: no such directory")
    if not (path / "config.json").is_file():
        raise ValueError(f"{key}.path = {str(path)!r}: no config.json in it; give a Hugging Face model directory")
    if not safetensors_files(path):
        raise ValueError(f"{key}.path = {str(path)!r}: no *.safetensors in it; save the model as safetensors")
    try:
        architecture = parse_architecture(read_json(path / "config.json"))
    except KeyError as error:
        raise ValueError(f"{path / 'config.json'}: {error} is missing") from error
    heads = architecture.heads
    if tensor_parallel < 1 or heads % tensor_parallel:
        divisors = [str(n) for n in range(1, heads + 1) if heads % n == 0]
        raise ValueError(
            f"{key}.tensor_parallel = {tensor_parallel}: must divide the {heads} attention heads; "
            f"these would do: {', '.join(divisors)}"
        )
