"""EuroEval with our own generation: its vLLM model class on a stand-in for vLLM.

The leaderboard's figures come from EuroEval's `VLLMModel`: prompts, stop strings, truncation, the choice between
labels, what is cut from a generation. All of that is used as it is. Only `vllm.LLM` is ours: the same call on a Hugging
Face model, on CPU or CUDA, with the common few-shot beginning computed once (eval/prefix_generation.py).

What differs from vLLM, and is said in the results (eval/euroeval_run.py): decoding is always greedy, also where the
model's generation_config.json asks for sampling; the JSON of entity recognition is not enforced by a grammar; a prompt
that is too long loses its beginning, not its question; a chat template's start token is not doubled.

Importing this module imports EuroEval: half a minute on a busy machine.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from eval.perplexity import load_model
from eval.prefix_generation import Generated, Stops, generate


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


@dataclass(frozen=True)
class Logprob:
    """As vllm.logprobs.Logprob."""

    decoded_token: str
    logprob: float


@dataclass(frozen=True)
class Completion:
    """As vllm.CompletionOutput."""

    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None


@dataclass(frozen=True)
class Output:
    """As vllm.RequestOutput."""

    prompt: str
    outputs: list[Completion]


if importlib.util.find_spec("vllm") is None:
    vllm_module.SamplingParams = SamplingParams
    vllm_module.StructuredOutputsParams = StructuredOutputsParams


class Engine:
    """`vllm.LLM` as far as EuroEval uses it. What it has generated it writes down, so that a killed evaluation goes on.

    `model`, `tokenizer`: Hugging Face's, the model in evaluation mode. `journal`: JSONL file, read and appended to.
    `progress` is told how many prompts have been answered.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, batch: int, progress: Callable[[int], None] = lambda rows: None
    ) -> None:
        self.model, self.tokenizer, self.batch, self.progress = model, tokenizer, batch, progress
        self.journal: Path | None = None
        self.known: dict[str, Generated] = {}

    def open_journal(self, journal: Path) -> None:
        """Remember what `journal` holds, and write there from now on."""
        self.journal, self.known = journal, {}
        if journal.is_file():
            for line in journal.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except ValueError:  # the last line of a killed process
                    continue
                logprobs = [{int(token): value for token, value in place} for place in row["logprobs"]]
                self.known[row["key"]] = Generated(tokens=row["tokens"], logprobs=logprobs)

    def generate(
        self, prompts: Sequence[str], sampling_params: SamplingParams, use_tqdm: Any = None, lora_request: Any = None
    ) -> list[Output]:
        """Greedy completions of `prompts`."""
        del lora_request  # adapters are in the model
        stops = self._stops(sampling_params)
        rules = (sampling_params.stop, stops.max_new_tokens, stops.choices)
        keys = [hashlib.sha256(f"{prompt}\0{rules}".encode()).hexdigest() for prompt in prompts]
        missing = [index for index, key in enumerate(keys) if key not in self.known]
        report = self.progress if use_tqdm else lambda rows: None
        report(len(prompts) - len(missing))

        def done(indices: list[int], results: list[Generated]) -> None:
            found = {keys[missing[index]]: result for index, result in zip(indices, results, strict=True)}
            self.known |= found
            self._write(found)
            report(len(indices))

        ids = [self.encode(prompts[index]) for index in missing]
        if ids:
            generate(self.model, ids, stops, batch=self.batch, done=done)
        return [
            self._output(prompt, self.known[key], sampling_params) for prompt, key in zip(prompts, keys, strict=True)
        ]

    def encode(self, prompt: str) -> list[int]:
        """Token ids; a chat template has written the start token already, so it is not put there again."""
        start = self.tokenizer.bos_token
        return list(self.tokenizer(prompt, add_special_tokens=not (start and prompt.startswith(start)))["input_ids"])

    def _stops(self, params: SamplingParams) -> Stops:
        ends = self.model.generation_config.eos_token_id
        ends = set(ends) if isinstance(ends, list) else {ends}
        strings = list(params.stop)

        def ends_text(tokens: list[int]) -> bool:
            tail = self.tokenizer.decode(tokens[-16:], skip_special_tokens=False)
            return any(text in tail for text in strings)

        choice = params.structured_outputs.choice if params.structured_outputs is not None else None
        choices = (tuple(self.tokenizer.encode(text, add_special_tokens=False)) for text in choice or [])
        return Stops(
            max_new_tokens=params.max_tokens,
            ends=frozenset(end for end in ends | {self.tokenizer.eos_token_id} if end is not None),
            ends_text=ends_text,
            choices=tuple(choices),
            logprobs=params.logprobs or 0,
        )

    def _output(self, prompt: str, found: Generated, params: SamplingParams) -> Output:
        logprobs = [
            {token: Logprob(self.tokenizer.decode([token]), value) for token, value in place.items()}
            for place in found.logprobs
        ]
        return Output(prompt, [Completion(found.tokens, logprobs if params.logprobs else None)])

    def _write(self, found: Mapping[str, Generated]) -> None:
        if self.journal is None:
            return
        with self.journal.open("a", encoding="utf-8") as file:
            for key, result in found.items():
                row = {"key": key, "tokens": result.tokens, "logprobs": [list(p.items()) for p in result.logprobs]}
                file.write(json.dumps(row) + "\n")


# --- the model -----------------------------------------------------------------------------------------------------


@dataclass
class Recorder:
    """Every generation of a task, as EuroEval took it."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    """One a row and iteration: `iteration`, `prompt` (without the examples), `generation`, `prediction`, and the gold
    `label`, `answers` or `labels` with `tokens`."""
    scores: list[dict[str, float]] = field(default_factory=list)
    """What EuroEval made of each iteration."""

    def add(self, batch: Mapping[str, Sequence[Any]], sequences: Sequence[str], labels: Sequence[Any]) -> None:
        """Rows of the iteration that is going on."""
        for index, (generation, prediction) in enumerate(zip(sequences, labels, strict=True)):
            row = {"iteration": len(self.scores), "prompt": batch["prompt"][index], "generation": generation}
            # Copied: EuroEval's metric for entities changes the labels that it is given.
            row["prediction"] = json.loads(json.dumps(prediction))
            row |= {key: batch[key][index] for key in ("id", "answers", "tokens", "labels") if key in batch}
            if isinstance(gold := batch.get("label", [None] * (index + 1))[index], str):
                row["label"] = gold
            self.rows.append(row)


class LocalModel(VLLMModel):
    """EuroEval's vLLM model on an `Engine`."""

    def __init__(
        self,
        engine: Engine,
        *,
        model_config: Any,
        dataset_config: Any,
        benchmark_config: Any,
        recorder: Recorder,
    ) -> None:
        # VLLMModel's own __init__ starts vLLM; this is what it does afterwards.
        self._model, self._tokeniser = engine, engine.tokenizer
        BenchmarkModule.__init__(
            self,
            model_config=model_config,
            dataset_config=dataset_config,
            benchmark_config=benchmark_config,
            log_metadata=False,
        )
        self.recorder, self.truncated = recorder, 0
        self.end_of_reasoning_token = None
        self.end_of_chat_token_ids = get_end_of_chat_token_ids(
            tokeniser=engine.tokenizer, generative_type=self.generative_type
        )
        self.custom_stop_tokens = vllm_module.get_custom_stop_tokens(
            model=engine, tokeniser=engine.tokenizer, model_id=model_config.model_id,
            generative_type=self.generative_type,
        )  # fmt: skip

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
            self.recorder.add(input_batch, model_output.sequences, labels)
            return labels

        return extract_and_record

    @property
    def compute_metrics(self) -> Callable[..., dict[str, float]]:
        """EuroEval's metrics; an iteration ends with them."""
        compute = super().compute_metrics

        def compute_and_record(**arguments: Any) -> dict[str, float]:
            scores = dict(compute(**arguments))
            self.recorder.scores.append(scores)
            return scores

        return compute_and_record


def load(model_dir: Path, dtype: str) -> tuple[Any, Any]:
    """(model in evaluation mode on its device, tokenizer); an adapter is merged into its base.

    ValueError where that cannot be.
    """
    if not (model_dir / "adapter_config.json").is_file():
        return load_model(model_dir, dtype)
    from peft import PeftConfig, PeftModel
    from transformers import AutoTokenizer

    try:
        base = str(PeftConfig.from_pretrained(str(model_dir)).base_model_name_or_path)
        model, tokenizer = load_model(base, dtype)
        model = PeftModel.from_pretrained(model, str(model_dir)).merge_and_unload().eval()
        if (model_dir / "tokenizer_config.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(model_dir)
    except Exception as error:  # half-written files raise nearly anything
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{model_dir}: the adapter cannot be loaded ({type(error).__name__}: {reason})") from error
    return model, tokenizer


def prepare_tokenizer(tokenizer: Any, model: Any, kind: str) -> None:
    """What EuroEval's code needs of a tokenizer of transformers 5; `kind`: base or instruct."""
    if kind == "base":
        tokenizer.chat_template = None  # or EuroEval takes its labels out of the template, and the wrong ones
    else:
        tokenizer.apply_chat_template = partial(tokenizer.apply_chat_template, return_dict=False)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
    tokenizer.truncation_side = "left"
