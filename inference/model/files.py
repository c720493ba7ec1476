"""What a model directory holds, from file names, JSON and the safetensors' headers alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from configs.checks import require
from configs.io.files import read_json
from configs.io.hub import base_of, find_model, is_adapter
from inference.model.families import Architecture, Family, Weight, family_of, parse_architecture

PLAIN_TYPES = {"F64", "F32", "F16", "BF16"}
"""Types whose values are the weights. Float8 and integers stand for them together with scales."""
NOT_READ = re.compile(
    r"rotary_emb\.inv_freq$|(^|\.)attn\.(masked_)?bias$"  # buffers that older transformers saved
    r"|^(model\.)?(vision_tower|vision_model|multi_modal_projector|visual|mtp)\."  # images, multi-token prediction
)
"""Tensors that no text is computed with."""
_SAMPLED_ROWS = 64


def safetensors_files(path: Path) -> list[Path]:
    """The files that transformers reads: model.safetensors, or those of its index; none where there is neither.

    Raises ValueError where the index is none, or names a file that is not there.
    """
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if whole.is_file() or not index.is_file():
        return [whole] if whole.is_file() else []
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
        raise ValueError(f"{index}: no weight_map from tensors to files; fetch the model again")
    names = set(placed.values())
    for name in names:
        if not (path / name).is_file():
            raise ValueError(f"{path}: its {index.name} names {name!r}, which is not there; fetch the model again")
    return sorted(path / name for name in names)


def end_ids(path: Path) -> tuple[int, ...]:
    """Every end symbol of the model: those of its config.json and of its generation_config.json."""
    found: set[int] = set()
    home = base_of(path)
    for file in (home / "config.json", home / "generation_config.json"):
        content = read_json(file) if file.is_file() else {}
        named = content.get("eos_token_id")
        if named is None:  # one that is null says nothing
            named = (content.get("text_config") or {}).get("eos_token_id")
        found.update(named if isinstance(named, list) else [] if named is None else [named])
    return tuple(sorted(found))


def context_of(settings: dict[str, Any]) -> int | None:
    """Longest sequence, in tokens, that a language model's settings allow; None where they do not say.

    LongRoPE (Phi 3 and 4, arXiv 2402.13753) turns every token of a sequence otherwise as soon as one of them, or of
    those computed beside it, is past the first context: what a token's probability is would depend on what follows. So
    it ends there.
    """
    sizes = [settings.get(name) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) in ("longrope", "su"):
        first = "original_max_position_embeddings"
        sizes = [settings.get(first), rope.get(first), *sizes]
    return next((size for size in sizes if isinstance(size, int) and size > 0), None)


def quantization(config: dict[str, Any]) -> dict[str, Any]:
    """How a checkpoint's weights are quantised, from its config.json; empty where they are not."""
    inside = config.get("text_config")
    for one in (config, inside if isinstance(inside, dict) else {}):
        if one.get("quantization_config"):
            return dict(one["quantization_config"])
    return {}


def scale_blocks(config: dict[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share one `weight_scale_inv` (Qwen 3's and DeepSeek's FP8). None: not quantised.

    Raises ValueError for any other way to quantise.
    """
    how = quantization(config)
    if not how:
        return None
    if how.get("quant_method") == "fp8" and how.get("weight_block_size"):
        rows, columns = how["weight_block_size"]
        return int(rows), int(columns)
    raise ValueError(f"its weights are quantised ({how.get('quant_method')!r} in quantization_config)")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    file: Path
    dtype: str
    """As safetensors names it: BF16, F8_E4M3, ..."""
    shape: tuple[int, ...]

    def rows(self, name: str) -> Any:
        """The tensor `name` that this is, lazily: indexing it reads only that part. Each has a mapping of its own: what
        was read counts as this process's memory until the mapping goes."""
        return safe_open(str(self.file), framework="pt").get_slice(name)


def stored_tensors(file: Path) -> dict[str, Stored]:
    """name -> tensor, from the header of a safetensors file. Raises ValueError where it is none."""
    try:
        with safe_open(str(file), framework="np") as opened:  # loads no torch
            found = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {name: Stored(file, one.get_dtype(), tuple(one.get_shape())) for name, one in found.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file.name} is damaged ({' '.join(str(error).split())[:150]}); copy it again") from None


class Checkpoint:
    """The tensors of a model directory, by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.blocks = scale_blocks(read_json(path / "config.json"))
        """As `scale_blocks` has it."""
        self.tensors: dict[str, Stored] = {}
        for file in safetensors_files(path):
            self.tensors |= stored_tensors(file)

    def find(self, *names: str) -> str:
        """The first of these names that is there."""
        for name in names:
            if name in self.tensors:
                return name
        raise ValueError(f"{self.path}: no tensor named {' or '.join(map(repr, names))}")

    def prefix(self, family: Family) -> str:
        """What stands before the family's tensor names in this checkpoint."""
        embedding = family.weights[0].sources[0]
        return self.find(*(prefix + embedding for prefix in family.prefixes)).removesuffix(embedding)

    def tied(self, family: Family, architecture: Architecture) -> bool:
        """Whether the output layer is the embedding. As in transformers, an output layer in the file that is not
        equal to it counts for more than config.json."""
        own = [name for name in family.output if name in self.tensors]
        embedding = self.prefix(family) + family.weights[0].sources[0]
        return architecture.tied and (not own or self._equal(own[0], embedding))

    def _equal(self, one: str, other: str) -> bool:
        """Whether two matrices agree, in rows that are spread over them."""
        first, second = self.tensors[one], self.tensors[other]
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            return False
        a, b = first.rows(one), second.rows(other)
        places = range(0, first.shape[0], max(1, first.shape[0] // _SAMPLED_ROWS))
        return all(bool((a[i : i + 1] == b[i : i + 1]).all()) for i in places)

    def output_name(self, family: Family, architecture: Architecture) -> str:
        """Name of the output layer's tensor: its own, or the embedding where the two are tied."""
        if self.tied(family, architecture):
            return self.prefix(family) + family.weights[0].sources[0]
        return self.find(*family.output)

    def parameters(self, family: Family, architecture: Architecture) -> Iterator[tuple[str, list[str], Weight]]:
        """Each Megatron parameter, the tensors that make it, and how."""
        prefix = self.prefix(family)
        for weight in family.weights:
            for i in map(str, range(len(architecture.layers)) if "{i}" in weight.target else (0,)):
                sources = [prefix + source.replace("{i}", i) for source in weight.sources]
                yield weight.target.replace("{i}", i), sources, weight
        if not self.tied(family, architecture):
            output = Weight("output_layer.weight", (self.output_name(family, architecture),), "vocab")
            yield output.target, list(output.sources), output

    def check(self, family: Family, architecture: Architecture) -> None:
        """Raises ValueError unless every tensor is read, or known to be of no use, and holds plain numbers."""
        needed = [source for _, sources, _ in self.parameters(family, architecture) for source in sources]
        _refuse(self.path, "has no", [name for name in needed if name not in self.tensors])
        scales = set()
        if self.blocks is not None:
            scales = {scale for scale in (name + "_scale_inv" for name in needed) if scale in self.tensors}
        known = {*needed, *scales, *(family.output if architecture.tied else ())}
        unread = [name for name in self.tensors if name not in known and not NOT_READ.search(name)]
        _refuse(self.path, "has tensors that this backend would leave out:", unread)
        _refuse(
            self.path,
            "holds packed numbers in place of weights:",
            [n for n in needed if self.tensors[n].dtype not in PLAIN_TYPES and n + "_scale_inv" not in scales],
        )


def _refuse(path: Path, what: str, names: Iterable[str]) -> None:
    found = list(names)
    if found:
        more = f" and {len(found) - 2} more" if len(found) > 2 else ""
        raise ValueError(f"{path}: {what} {', '.join(found[:2])}{more}")


def check_directory(path: Path, key: str = "teacher") -> None:
    """Raise a ValueError unless `path` holds a whole model. `key`: whose setting it is, for the message."""
    asked = f"{key}.path", str(path)
    model_directory(*asked)
    files = "no model.safetensors in it, nor an index of its shards; save it with save_pretrained"
    require(bool(safetensors_files(path)), *asked, files)
    require(not is_adapter(path), *asked, "there is an adapter in it (adapter_config.json); merge it into the model")


def megatron_model(path: Path, key: str = "teacher") -> Architecture:
    """The architecture of a model that the Megatron backend computes exactly, or a ValueError that says why not."""
    config = read_json(path / "config.json")
    try:
        family, architecture = family_of(config), parse_architecture(config)
        if config.get("transformers_weights") is not None:
            raise ValueError(
                f"transformers_weights = {config['transformers_weights']!r}: only model.safetensors is read"
            )
        Checkpoint(path).check(family, architecture)
    except KeyError as error:
        raise ValueError(f"{path / 'config.json'}: {error} is missing") from error
    except ValueError as error:
        raise ValueError(
            f"{key}.path = {str(path)!r}: {error}; use the unquantised checkpoint of a family in docs/teacher.md, or "
            f"{key}.backend transformers"
        ) from None
    return architecture


def tensor_parallel_sizes(heads: int) -> list[int]:
    """Ranks that one teacher can have: each takes the same number of heads."""
    return [size for size in range(1, heads + 1) if heads % size == 0]


def check_heads(architecture: Architecture, tensor_parallel: int, key: str = "teacher") -> None:
    """Raise a ValueError unless so many processes divide the attention heads."""
    sizes = tensor_parallel_sizes(architecture.heads)
    these = f"must divide the {architecture.heads} attention heads; these would do: {', '.join(map(str, sizes))}"
    require(tensor_parallel in sizes, f"{key}.tensor_parallel", tensor_parallel, these)


def model_directory(key: str, path: str, *, weights: bool = True) -> Path:
    """The directory of a Hugging Face model, with weights unless they are not wanted, by its path or its hub id. Raises
    ValueError."""
    directory = find_model(key, path, weights=weights)
    require(directory.is_dir(), key, path, "no such directory; give a Hugging Face model directory or a hub id")
    require(
        (directory / "config.json").is_file(), key, path, "no config.json in it; give a Hugging Face model directory"
    )
    require(not weights or bool(list(directory.glob("*.safetensors"))), key, path, "no weights (*.safetensors) in it")
    return directory
