"""The model that is measured: found, loaded once for all measures, and asked in its own way."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from configs.io.files import fingerprint
from configs.io.hub import base_of, find_model, is_adapter, read_tokenizer
from configs.schema import RunConfig
from eval.measures.model_dirs import output_folder


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
