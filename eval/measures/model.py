"""The model that is measured: found, loaded once for all measures, and asked in its own way."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from configs.io.files import fingerprint
from configs.io.hub import find_model, read_tokenizer
from configs.prompts import Format
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
        return load_model(find_model("--model", self.path), self.dtype)

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
        """Changes when the files of its directory do; a hub id stands for itself."""
        return fingerprint(self.path, whole=False) or self.path.replace("/", "--")

    @property
    def folder(self) -> Path:
        """Where what is measured of it is written."""
        return output_folder(self.path, self.runs_dir)


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
        if (Path(model_dir) / "adapter_config.json").is_file():
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
    from peft import PeftConfig, PeftModel
    from transformers import AutoTokenizer

    base = str(PeftConfig.from_pretrained(model_dir).base_model_name_or_path)
    model, tokenizer = load_model(find_model("base_model_name_or_path", base), dtype)
    if (Path(model_dir) / "tokenizer_config.json").is_file():
        tokenizer = read_tokenizer(AutoTokenizer, model_dir)
    return PeftModel.from_pretrained(model, model_dir).merge_and_unload().eval(), tokenizer


def context_length(network: Any) -> int | None:
    """Longest sequence, in tokens; None where the configuration does not say."""
    return getattr(network.config.get_text_config(), "max_position_embeddings", None)


def end_tokens(network: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer: the tokenizer's and the model's (chat models have several)."""
    own = network.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    return frozenset(end for end in ends if end is not None)


def prompt_tokens(tokenizer: Any, text: str, chat: bool) -> list[int]:
    """Token ids of a text; `chat`: as a user's message in the model's chat template."""
    return list(Format(tokenizer, "chat" if chat else "plain").prompt(text))
