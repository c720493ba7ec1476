"""The model that is measured: found, loaded once for all measures, and asked in its own way; where its results go."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from configs.io.files import fingerprint, read_yaml
from configs.io.hub import base_of, find_model, has_tokenizer, is_adapter, read_tokenizer
from configs.schema import RunConfig


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model directory, an adapter's directory or a hub id.

    Weights and tokenizer are read when they are first asked for: a measure looks at its data before, so that a mistake
    there is told at once.
    """

    path: str
    """As the user calls it."""
    dtype: str = "float32"
    """Parameter and compute type."""
    runs_dir: Path = Path(RunConfig().runs_dir)
    """Folder of all runs."""

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        network, tokenizer = load_model(find_model("--model", self.path), self.dtype)
        forbid_unknown_tokens(network, tokenizer)
        return network, tokenizer

    @property
    def network(self) -> Any:
        """Hugging Face causal language model, in evaluation mode on its device."""
        return self._loaded[0]

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self._loaded[1]

    @cached_property
    def weights(self) -> str:
        """Changes when the files of its directory do, or those of the model that an adapter goes on top of."""
        return _content(self.path)

    @property
    def folder(self) -> Path:
        """Where what is measured of it is written."""
        return output_folder(self.path, self.runs_dir)


def _content(path: str) -> str:
    """What is in the files of a model, by its path or its hub id."""
    directory = find_model("--model", path)
    own = fingerprint(directory, whole=False)
    return f"{own}-{_content(str(base_of(directory)))}" if is_adapter(directory) else own


def load_model(model_dir: str | Path, dtype: str = "float32") -> tuple[Any, Any]:
    """(model in evaluation mode on its device, tokenizer); an adapter is merged into its base.

    Raises ValueError where that cannot be.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if is_adapter(model_dir):
            return _load_adapter(str(model_dir), dtype)
        tokenizer = read_tokenizer(AutoTokenizer, model_dir)
        model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False
        )
    except Exception as error:  # half-written files raise nearly anything
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{model_dir}: the model cannot be loaded ({type(error).__name__}: {reason})") from error
    return model.to(device).eval(), tokenizer


def _load_adapter(model_dir: str, dtype: str) -> tuple[Any, Any]:
    from peft import PeftModel
    from transformers import AutoTokenizer

    model, tokenizer = load_model(base_of(model_dir), dtype)
    if (Path(model_dir) / "tokenizer_config.json").is_file():
        tokenizer = read_tokenizer(AutoTokenizer, model_dir)
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:  # tokens that were added, as peft finds them
            model.resize_token_embeddings(len(tokenizer))
    return PeftModel.from_pretrained(model, model_dir).merge_and_unload().eval(), tokenizer


def forbid_unknown_tokens(network: Any, tokenizer: Any) -> None:
    """No probability for columns of the vocabulary that no entry of the tokenizer has, which only fill the matrix up:
    as in the trainer and the teacher."""
    import torch

    count = network.config.get_text_config().vocab_size
    unknown = torch.ones(count, dtype=torch.bool)
    unknown[[token for token in tokenizer.get_vocab().values() if token < count]] = False
    if not bool(unknown.any()):
        return
    unknown = unknown.to(network.device)

    def forbid(module: Any, inputs: Any, output: Any) -> None:
        output.logits.masked_fill_(unknown, float("-inf"))

    network.register_forward_hook(forbid)


def not_numbers(network: Any) -> ValueError:
    """For logits that are NaN: the likeliest of them would be taken for an answer."""
    reason = "its logits are not numbers (NaN): the weights are broken, or too large for the type; give another --dtype"
    return ValueError(f"{network.name_or_path}: {reason}")


def context_length(network: Any) -> int | None:
    """Longest sequence, in tokens; None where the configuration does not say."""
    return getattr(network.config.get_text_config(), "max_position_embeddings", None)


def end_tokens(network: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer: the tokenizer's and the model's (chat models have several)."""
    own = network.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    return frozenset(end for end in ends if end is not None)


def written_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt whose special symbols are meant: a start that a chat template has written is not put there
    again, and an end that the tokenizer puts behind every text is left out, because nothing would come behind it."""
    start, end = tokenizer.bos_token, tokenizer.eos_token
    ids = list(tokenizer(prompt, add_special_tokens=not (start and prompt.startswith(start)))["input_ids"])
    return ids[:-1] if end and ids[-1:] == [tokenizer.eos_token_id] and not prompt.endswith(end) else ids


# --- runs and folders ----------------------------------------------------------------------------------------------


def newest_run(runs_dir: Path, file: str = "config.yaml") -> Path:
    """The run whose `file` was written last. Raises ValueError where none has it."""
    found = list(runs_dir.glob(f"*/{file}"))
    if not found:
        raise ValueError(
            f"--runs_dir = {str(runs_dir)!r}: no run with {file} in it; train first (bash slurm/run_stage2_grpo.sh), "
            "or name one"
        )
    newest = max(found, key=lambda path: path.stat().st_mtime_ns)
    return runs_dir / newest.relative_to(runs_dir).parts[0]


def newest_export(runs_dir: Path) -> Path:
    """The export that was written last."""
    return newest_run(runs_dir, "export/config.json") / "export"


def check_model(named: str | Path) -> Path:
    """The directory of a model, by its path or its hub id, with configuration, weights and tokenizer, seen before
    anything is loaded. Raises ValueError."""
    name, model = f"--model {named}", find_model("--model", named)
    if not model.is_dir():
        raise ValueError(f"{name}: no such directory; give a Hugging Face model directory or a hub id")
    if is_adapter(model):
        try:
            base = base_of(model, weights=True)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        check_model(base)
        return model
    if not (model / "config.json").is_file():
        raise ValueError(f"{name}: no config.json in it; give a Hugging Face model directory")
    if not any(model.glob("*.safetensors")):
        raise ValueError(f"{name}: no weights (*.safetensors) in it; save the model with save_pretrained")
    if not has_tokenizer(model):
        raise ValueError(f"{name}: no tokenizer in it; save one there with save_pretrained")
    return model


def run_of(model: str | Path) -> Path | None:
    """The run whose export this is."""
    path = Path(model).resolve()
    run = path.parent
    return Path(os.path.relpath(run)) if path.name == "export" and (run / "config.yaml").is_file() else None


def run_config(run: Path, needed: Sequence[str] = ()) -> dict[str, Any]:
    """The settings in a run's config.yaml. Raises ValueError where it is not there, or lacks a `needed` section."""
    file = run / "config.yaml"
    content = read_yaml(file)
    if not isinstance(content, dict) or not set(needed) <= content.keys():
        raise ValueError(f"{file}: not the config.yaml of a run; give the folder of a run (runs/NAME)")
    return content


def output_folder(model: str | Path, runs_dir: str | Path) -> Path:
    """Where results go: beside the run's other evaluations, else into a folder named after the model. A hub id, of
    which there is no directory here, counts as its own path."""
    run = run_of(model)
    if run is None:
        resolved = str(Path(model).resolve() if Path(model).exists() else model)
        digest = hashlib.sha256(resolved.encode()).hexdigest()[:8]
        run = Path(runs_dir) / "models" / f"{Path(resolved).name}-{digest}"
    return run / "eval"
