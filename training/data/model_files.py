"""Can the files of a model directory be used? Seen from headers, config.json and the tokenizer; no weight is read."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from configs.io.files import read_json
from inference.model.files import quantization, safetensors_files, stored_tensors
from inference.protocol.fingerprint import load_tokenizer


def check_model_files(key: str, directory: Path, *, weights: bool = True) -> None:
    """Raises ValueError, naming the setting `key`, where weights (if they are wanted), configuration or tokenizer
    cannot be used."""
    try:
        if weights:
            _check_configuration(directory, _shapes(directory))
        else:
            read_json(directory / "config.json")
        _check_tokenizer(directory)
    except ValueError as error:
        raise ValueError(f"{key} = {str(directory)!r}: {error}") from None


def _check_configuration(directory: Path, shapes: dict[str, list[int]]) -> None:
    """The model that config.json describes, built without memory, has tensors of the shapes that are in the files."""
    config = read_json(directory / "config.json")
    values = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    layers = values.get("num_hidden_layers", values.get("n_layer", 0))
    if not isinstance(layers, int) or not 0 <= layers <= len(shapes):
        raise ValueError(f"config.json says {layers!r} layers, and the weights are {len(shapes)} tensors")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory, trust_remote_code=False))
        quantised = bool(quantization(config))
    except Exception as error:  # each model's class has its own checks, or none
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"config.json describes no causal language model that transformers builds ({said})") from None
    for name, parameter in model.named_parameters():
        if not quantised and shapes.get(name, list(parameter.shape)) != list(parameter.shape):
            raise ValueError(f"config.json gives {name} the shape {list(parameter.shape)}, and it has {shapes[name]}")


def _shapes(directory: Path) -> dict[str, list[int]]:
    """Shape of each tensor by name."""
    files = safetensors_files(directory)
    shapes = {name: list(one.shape) for file in files for name, one in stored_tensors(file).items()}
    if not shapes:
        raise ValueError("no model.safetensors in it, nor an index of its shards; save it with save_pretrained")
    return shapes


def _check_tokenizer(directory: Path) -> None:
    try:
        tokenizer = load_tokenizer(directory)
        count = len(tokenizer)
        tokenizer("Føroyar")
    except Exception as error:  # the library raises many kinds; all mean the same to the user
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        raise ValueError(f"its tokenizer cannot be read ({reason}); save one there with save_pretrained") from None
    if not count:
        raise ValueError("no tokenizer in it; save one there with save_pretrained")
