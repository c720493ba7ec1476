"""EuroEval with our own generation: its vLLM model class on a stand-in for vLLM.

The leaderboard's figures come from EuroEval's `VLLMModel`: prompts, stop strings, truncation, the choice between
labels, what is cut from a generation. All of that is used as it is. Only `vllm.LLM` is ours: the same call on a Hugging
Face model, on CPU or CUDA, with the common few-shot beginning computed once (eval/measures/generation.py).

What differs from vLLM, and is said in the results (eval/euroeval/run.py): decoding is always greedy, also where the
model's generation_config.json asks for sampling; the JSON of entity recognition is not enforced by a grammar; a prompt
that is too long loses its beginning, not its question; a chat template's start token is not doubled, and an end token
that the tokenizer puts behind every text is left out.

Importing this module imports EuroEval: half a minute on a busy machine.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from eval.euroeval.data import check_draws
from eval.measures.generation import Decoding, Generated, Journal, generate
from eval.measures.model import context_length, end_tokens, written_tokens


@contextmanager
def _without_flash_attn() -> Iterator[None]:
    """EuroEval ends the process where flash-attn is installed, because of vLLM, which is not used here."""
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, package=None: None if name == "flash_attn" else find(name, package)
    try:
        yield
    finally:
        importlib.util.find_spec = find


os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or importing litellm asks the network
with _without_flash_attn():
    import euroeval  # noqa: F401
from euroeval.benchmark_modules import vllm as vllm_module
from euroeval.benchmark_modules.base import BenchmarkModule
from euroeval.benchmark_modules.vllm import VLLMModel
from euroeval.tokenisation_utils import get_end_of_chat_token_ids

logging.getLogger("euroeval").setLevel(logging.ERROR)


# --- what VLLMModel expects of vLLM --------------------------------------------------------------------------------


@dataclass(kw_only=True)
class StructuredOutputsParams:
    """As vllm.sampling_params.StructuredOutputsParams."""

    choice: list[str] | None = None
    """The generation is one of these."""
    json: Any = None
    """JSON schema; not enforced here."""


@dataclass(kw_only=True)
class SamplingParams:
    """As vllm.SamplingParams; what is not greedy is ignored."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    logprobs: int | None = None
    stop: Sequence[str] = ()
    structured_outputs: StructuredOutputsParams | None = None


if importlib.util.find_spec("vllm") is None:
    vllm_module.SamplingParams = SamplingParams
    vllm_module.StructuredOutputsParams = StructuredOutputsParams


class Engine:
    """`vllm.LLM` as far as EuroEval uses it. `model`, `tokenizer`: Hugging Face's, the model in evaluation mode."""

    def __init__(self, model: Any, tokenizer: Any, *, batch: int) -> None:
        self.model, self.tokenizer, self.batch = model, tokenizer, batch
        self.journal: Journal | None = None
        """Where what has been generated is written down."""
        self.progress: Callable[[int], object] = lambda rows: None
        """Told how many more prompts have been answered."""

    def generate(
        self, prompts: Sequence[str], sampling_params: SamplingParams, use_tqdm: Any = None, lora_request: Any = None
    ) -> list[SimpleNamespace]:
        """Greedy completions of `prompts`, as vllm.RequestOutput has them."""
        del lora_request  # adapters are in the model
        ids = [self.encode(prompt) for prompt in prompts]
        progress = self.progress if use_tqdm else lambda rows: None
        found = generate(self.model, ids, self._decoding(sampling_params), self.journal, progress)
        outputs = []
        for prompt, one in zip(prompts, found, strict=True):
            logprobs = self._logprobs(one) if sampling_params.logprobs else None
            completion = SimpleNamespace(token_ids=one.tokens, logprobs=logprobs)
            outputs.append(SimpleNamespace(prompt=prompt, outputs=[completion]))
        return outputs

    def encode(self, prompt: str) -> list[int]:
        """Token ids."""
        return written_tokens(self.tokenizer, prompt)

    def _decoding(self, params: SamplingParams) -> Decoding:
        choices = params.structured_outputs.choice if params.structured_outputs is not None else None
        return Decoding(
            max_new_tokens=params.max_tokens,
            batch=self.batch,
            ends=end_tokens(self.model, self.tokenizer),
            stops=tuple(params.stop),
            decode=partial(self.tokenizer.decode, skip_special_tokens=False),
            choices=tuple(tuple(self.tokenizer.encode(one, add_special_tokens=False)) for one in choices or []),
            logprobs=params.logprobs or 0,
        )

    def _logprobs(self, found: Generated) -> list[dict[int, SimpleNamespace]]:
        def one(token: int, value: float) -> SimpleNamespace:
            return SimpleNamespace(decoded_token=self.tokenizer.decode([token]), logprob=value)

        return [{token: one(token, value) for token, value in place.items()} for place in found.logprobs]


# --- the model -----------------------------------------------------------------------------------------------------


class LocalModel(VLLMModel):
    """EuroEval's vLLM model on an `Engine`. Writes down what it was asked and how EuroEval took the answer."""

    def __init__(self, engine: Engine, model_config: Any, dataset_config: Any, benchmark_config: Any) -> None:
        # VLLMModel's own __init__ starts vLLM; this is what it does afterwards.
        self._model, self._tokeniser = engine, engine.tokenizer
        BenchmarkModule.__init__(
            self,
            model_config=model_config,
            dataset_config=dataset_config,
            benchmark_config=benchmark_config,
            log_metadata=False,
        )
        self.rows: list[dict[str, Any]] = []
        """One a row and iteration: `iteration`, `prompt` (without the examples), `generation`, `prediction`, and the
        gold `label`, `answers` or `labels` with `tokens`."""
        self.iteration = 0
        self.truncated = 0
        """Prompts that EuroEval shortened."""
        self.end_of_reasoning_token = None
        self.end_of_chat_token_ids = get_end_of_chat_token_ids(
            tokeniser=engine.tokenizer, generative_type=self.generative_type
        )
        self.custom_stop_tokens = vllm_module.get_custom_stop_tokens(
            model=engine,
            tokeniser=engine.tokenizer,
            model_id=model_config.model_id,
            generative_type=self.generative_type,
        )

    def __del__(self) -> None:
        """VLLMModel would take vLLM down."""

    @property
    def num_params(self) -> int:
        """Parameters of the model."""
        return sum(parameter.numel() for parameter in self._model.model.parameters())

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary."""
        return int(self._model.model.config.get_text_config().vocab_size)

    @property
    def model_max_length(self) -> int:
        """Longest sequence, in tokens."""
        return int(self._tokeniser.model_max_length)

    def prepare_datasets(self, datasets: Any, task: Any) -> Any:
        """EuroEval's prompts, of samples that hold enough examples."""
        check_draws(self.dataset_config, datasets)
        torch.use_deterministic_algorithms(False)  # EuroEval's global switch; generation is greedy
        return super().prepare_datasets(datasets=datasets, task=task)

    def generate(self, inputs: dict[str, Any]) -> Any:
        """EuroEval's generation; counts the prompts that it will shorten."""
        longest = min(self._tokeniser.model_max_length, vllm_module.MAX_CONTEXT_LENGTH)
        longest -= self.dataset_config.max_generated_tokens
        self.truncated += sum(len(ids) > longest for ids in self._tokeniser(inputs["text"])["input_ids"])
        return super().generate(inputs)

    @property
    def extract_labels_from_generation(self) -> Callable[..., Any]:
        """EuroEval's extraction; what goes in and comes out is written down."""
        extract = super().extract_labels_from_generation

        def extract_and_record(input_batch: dict[str, Any], model_output: Any) -> Any:
            labels = extract(input_batch=input_batch, model_output=model_output)
            self._record(input_batch, model_output.sequences, labels)
            return labels

        return extract_and_record

    def _record(self, batch: Mapping[str, Sequence[Any]], sequences: Sequence[str], labels: Sequence[Any]) -> None:
        for index, (generation, prediction) in enumerate(zip(sequences, labels, strict=True)):
            row = {"iteration": self.iteration, "prompt": batch["prompt"][index], "generation": generation}
            # Copied: EuroEval's metric for entities changes the labels that it is given.
            row["prediction"] = json.loads(json.dumps(prediction))
            row |= {key: batch[key][index] for key in ("id", "answers", "tokens", "labels") if key in batch}
            if isinstance(gold := batch.get("label", [None] * (index + 1))[index], str):
                row["label"] = gold
            self.rows.append(row)

    @property
    def compute_metrics(self) -> Callable[..., dict[str, float]]:
        """EuroEval's metrics; an iteration ends with them."""
        compute = super().compute_metrics

        def compute_and_count(**arguments: Any) -> dict[str, float]:
            self.iteration += 1
            return dict(compute(**arguments))

        return compute_and_count


def prepare_tokenizer(tokenizer: Any, model: Any, kind: str) -> None:
    """What EuroEval's code needs of a tokenizer of transformers 5; `kind`: base or instruct."""
    if kind == "base":
        tokenizer.chat_template = None  # or EuroEval takes its labels out of the template, and the wrong ones
    else:
        tokenizer.apply_chat_template = partial(tokenizer.apply_chat_template, return_dict=False)
    longest = context_length(model)
    if longest is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
    tokenizer.truncation_side = "left"
