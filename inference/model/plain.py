"""A teacher that transformers runs: any causal language model, by its own forward pass, in one process.

Nothing is packed: each response has its own copy of the prompt, in a right-padded row. Logits are the model's own, with
whatever its class does behind the output layer, so what this backend says is what transformers says.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, LogitsProcessorList

from configs.schema import TeacherConfig
from inference.attention.packing import Group
from inference.model.files import NOT_READ, context_of, end_ids
from inference.model.output_layer import fingerprint_of, load_output_layer, logit_softcap, output_layer_hash
from inference.protocol.replies import NONE, TeacherInfo
from inference.protocol.wire import Request

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Item = tuple[int, tuple[int, ...], tuple[int, ...]]
"""Batch index, prompt, response."""
LOOKS_AHEAD = {"float32": 0.01, "bfloat16": 0.3}
"""Nats a vocabulary entry, mean difference, that only a model can have which sees what comes after a token: with other
tokens there, rounding differs where experts get other numbers of tokens alone."""
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layers that a mask keeps from seeing padding."""
Evaluate = Callable[[torch.Tensor, torch.Tensor], list[torch.Tensor]]
"""From logits float32 [R, V] and labels [R] of a response to what is said of its tokens."""


class PlainTeacher:
    """The whole model, as `inference.model.backend.Backend` describes it."""

    def __init__(self, config: TeacherConfig, device: torch.device) -> None:
        self._config, self._path, self._device = config, Path(config.path), device
        self._model = _load(config, device)
        self._text = self._model.config.get_text_config()
        self._keeps = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        self.vocab_size = self._logits(torch.zeros(1, 1, dtype=torch.int64), None, 1).shape[-1]
        self._check_causal()
        scale = self._head_scale()
        self.plain_head = scale is not None
        """Whether the output layer (and a soft cap) makes logits of hidden states: a client can then do that itself."""
        if scale is not None:
            self._scale = scale
            self.hidden = self._hidden

    @cached_property
    def info(self) -> TeacherInfo:
        """What clients may know."""
        return TeacherInfo(
            model=self._path.resolve().name,
            vocab_size=self.vocab_size,
            hidden_size=self._text.hidden_size,
            dtype=self._config.dtype,
            max_positions=context_of(self._text.to_dict()) or 1 << 20,
            eos_ids=end_ids(self._path),
            tokenizer_fingerprint=fingerprint_of(self._path),
            output_layer=output_layer_hash(self._path) if self.plain_head else NONE,
        )

    def parameters(self) -> Iterable[tuple[str, torch.Tensor]]:
        """The weights by their names in transformers."""
        return self._model.named_parameters()

    def score(self, request: Request) -> list[torch.Tensor]:
        """Log-probabilities [S] of the response tokens."""
        return self._of_tokens(
            request,
            lambda logits, labels: [(logits / request.temperature).log_softmax(-1).gather(1, labels[:, None])[:, 0]],
        )

    def topk(self, request: Request) -> list[torch.Tensor]:
        """The K likeliest entries: log-probabilities [S, K] and ids [S, K]."""
        return self._of_tokens(
            request, lambda logits, _: list((logits / request.temperature).log_softmax(-1).topk(request.k))
        )

    @torch.no_grad()
    def _hidden(self, request: Request) -> list[torch.Tensor]:
        """States [S, Hidden] whose product with the output layer are the logits, before a soft cap."""
        found: dict[int, torch.Tensor] = {}
        for batch in _batches(_items(request.groups), self._config.max_batch_tokens, None):
            states = self._backbone(*self._padded(batch))
            for row, (b, prompt, response) in zip(states, batch, strict=True):
                found[b] = (row[len(prompt) - 1 :][: len(response)] * self._scale).cpu()
        empty = torch.zeros(0, self._text.hidden_size, dtype=DTYPES[self._config.dtype])
        return [torch.cat([empty, *(found[b] for b in sorted(found))])]

    @torch.no_grad()
    def _of_tokens(self, request: Request, evaluate: Evaluate) -> list[torch.Tensor]:
        """`evaluate` of each response, in batch order."""
        empty = evaluate(torch.zeros(0, self.vocab_size), torch.zeros(0, dtype=torch.int64))
        found: dict[int, list[torch.Tensor]] = {}
        for batch in _batches(_items(request.groups), self._config.max_batch_tokens, self._config.logit_chunk):
            tokens, mask = self._padded(batch)
            first = min(len(prompt) for _, prompt, _ in batch) - 1
            logits = self._logits(tokens, mask, tokens.shape[1] - first)
            for row, (b, prompt, response) in zip(logits, batch, strict=True):
                mine = row[len(prompt) - 1 - first :][: len(response)].float()
                found[b] = [value.cpu() for value in evaluate(mine, torch.tensor(response, device=mine.device))]
        return [torch.cat([none, *(found[b][i] for b in sorted(found))]) for i, none in enumerate(empty)]

    def _padded(self, batch: Sequence[Item]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens [B, L], right-padded, and a mask where there is padding. The last token predicts nothing."""
        rows = [prompt + response[:-1] for _, prompt, response in batch]
        longest = max(map(len, rows))
        tokens = torch.tensor([row + row[:1] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return tokens, None if bool(mask.all()) else mask

    def _backbone(self, tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """States after the final norm, [B, L, Hidden]."""
        base = self._model.base_model
        base = self._model.model if base is self._model else base  # Llama 4's text model names it wrong
        return base(**self._inputs(tokens, mask)).last_hidden_state

    def _inputs(self, tokens: torch.Tensor, mask: torch.Tensor | None) -> dict[str, Any]:
        inputs = {"input_ids": tokens.to(self._device), "use_cache": False}
        return inputs if mask is None else {**inputs, "attention_mask": mask.to(self._device)}

    @torch.no_grad()
    def _logits(self, tokens: torch.Tensor, mask: torch.Tensor | None, last: int) -> torch.Tensor:
        """The model's logits at the last positions, [B, last, V]."""
        keep = {"logits_to_keep": last} if self._keeps else {}
        return self._model(**self._inputs(tokens, mask), **keep).logits[:, -last:]

    def _check_causal(self) -> None:
        """Raises ValueError where what it says of a token depends on those after it (BERT's kind, of which transformers
        makes causal language models too): its log-probabilities would be of answers that it has seen."""
        tokens = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 8, 9, 10, 11]]) % self.vocab_size
        one, other = (self._logits(row[None], None, 8)[0, :4].float().log_softmax(-1) for row in tokens)
        if float((one - other).abs().mean()) > LOOKS_AHEAD[self._config.dtype]:
            name = type(self._model).__name__
            raise ValueError(f"teacher.path = {self._config.path!r}: {name} looks at what follows; give a causal model")

    def _head_scale(self) -> float | None:
        """What hidden states have to be multiplied by to give the logits with the output layer that the files hold, and
        with config.json's soft cap; None where there is no such number."""
        head = self._model.get_output_embeddings()
        if head is None or getattr(head, "bias", None) is not None:
            return None
        try:
            stored, cap = load_output_layer(self._path), logit_softcap(self._path)
        except ValueError:  # quantised, or under another name
            return None
        weight = head.weight.detach()
        if stored.shape != weight.shape or not torch.equal(stored.to(weight.dtype), weight.cpu()):
            return None
        if weight.shape[1] != self._text.hidden_size:  # OPT-350M projects its states first
            return None
        tokens = torch.arange(min(16, self.vocab_size))[None]
        with torch.no_grad():
            states, logits = self._backbone(tokens, None)[0].float(), self._logits(tokens, None, tokens.shape[1])[0]
        logits = logits.float().cpu()
        product = states.cpu() @ stored.float().T
        allowed = 8 * torch.finfo(weight.dtype).eps * float(logits.abs().max())
        for scale in (1.0, getattr(self._text, "logit_scale", None), 1 / getattr(self._text, "logits_scaling", 1.0)):
            if scale is not None:
                made = product * scale if cap is None else cap * torch.tanh(product * scale / cap)
                if float((made - logits).abs().max()) <= allowed:
                    return float(scale)
        return None

    @torch.no_grad()
    def answer(self, request: Request) -> list[torch.Tensor]:
        """Answers by transformers' own `generate`, so with the cache that the model's class wants. A model that keeps a
        state answers prompts of one length together, because padding before a prompt would go through that state."""
        ends = list(request.ids)
        settings = GenerationConfig(
            max_new_tokens=request.max_new_tokens, do_sample=False, eos_token_id=ends or None, pad_token_id=0
        )
        answers: dict[int, list[int]] = {}
        for batch in self._prompt_batches(request):
            longest = max(len(prompt) for _, prompt in batch)
            tokens = torch.tensor([prompt[:1] * (longest - len(prompt)) + prompt for _, prompt in batch])
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for _, p in batch])
            noise = [_Gumbel([n for n, _ in batch], request, self._device)] if request.temperature > 0 else []
            out = self._model.generate(
                tokens.to(self._device),
                attention_mask=mask.to(self._device),
                generation_config=settings,
                logits_processor=LogitsProcessorList(noise),
            )
            for (n, _), row in zip(batch, out[:, longest:].tolist(), strict=True):
                end = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
                answers[n] = row[:end]
        ordered = [answers[n] for n in range(len(request.groups))]
        lengths = torch.tensor([len(answer) for answer in ordered], dtype=torch.int64)
        return [lengths, torch.tensor([token for answer in ordered for token in answer], dtype=torch.int64)]

    def _prompt_batches(self, request: Request) -> Iterator[list[tuple[int, tuple[int, ...]]]]:
        """Numbered prompts that are answered together, within the token budget."""
        prompts = sorted(enumerate(group.prompt for group in request.groups), key=lambda item: -len(item[1]))
        # Not every class with linear attention or convolutions says so (MiniMax, LFM2).
        others = set(getattr(self._text, "layer_types", None) or ()) - ATTENTION
        stateful = bool(others) or bool(getattr(self._model, "_is_stateful", False))
        for _, alike in groupby(prompts, key=lambda item: len(item[1]) * stateful):
            left = list(alike)
            while left:
                rows = max(1, self._config.max_batch_tokens // (len(left[0][1]) + request.max_new_tokens))
                yield left[:rows]
                left = left[rows:]


class _Gumbel(LogitsProcessor):
    """Makes the likeliest token a sampled one: noise from the answer's own stream, as the Megatron backend draws it, so
    that an answer does not depend on its batch."""

    def __init__(self, numbers: Sequence[int], request: Request, device: torch.device) -> None:
        self._temperature = request.temperature
        seeds = request.streams
        self._streams = [torch.Generator(device).manual_seed(seeds[n]) for n in numbers]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, V] in, the same with noise out."""
        noise = torch.empty_like(scores)
        for row, stream in zip(noise, self._streams, strict=True):
            row.exponential_(generator=stream)
        return scores / self._temperature - noise.log()


def _load(config: TeacherConfig, device: torch.device) -> Any:
    """The model, with every tensor of its files in it. Raises ValueError with the mend."""
    options: dict[str, Any] = {}
    if device.type == "cuda" and min(config.tensor_parallel, torch.cuda.device_count()) > 1:
        if find_spec("accelerate") is None:
            raise ValueError(
                f"teacher.tensor_parallel = {config.tensor_parallel}: the transformers backend deals layers to several "
                "devices by accelerate, which is not installed; pip install accelerate, or set it to 1"
            )
        options["device_map"] = "auto"
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            config.path, dtype=DTYPES[config.dtype], output_loading_info=True, **options
        )
    except Exception as error:  # transformers raises many kinds
        said = " ".join(str(error).split())[:300]
        raise ValueError(f"teacher.path = {config.path!r}: transformers does not load it: {said}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(name) for name in found.get(what, ()) if not NOT_READ.search(str(name)))
        if names:
            raise ValueError(
                f"teacher.path = {config.path!r}: {len(names)} {what.replace('_keys', '')} tensors, such as "
                f"{names[0]}; the checkpoint is not of the model that config.json says"
            )
    model.generation_config = GenerationConfig()  # what a model brings of its own would be mixed into every answer
    model = model if options else model.to(device)
    return model.requires_grad_(False).eval()


def _items(groups: Iterable[Group]) -> list[Item]:
    """The responses that have tokens, like prompts beside each other."""
    found = [(g.first_response + i, g.prompt, r) for g in groups for i, r in enumerate(g.responses) if r]
    return sorted(found, key=lambda item: (len(item[1]), len(item[2])))


def _batches(items: Sequence[Item], max_tokens: int, max_logits: int | None) -> Iterator[list[Item]]:
    """Cut so that padded rows have at most `max_tokens` tokens, and `max_logits` positions whose logits are alive; a
    single response may have more."""
    batch: list[Item] = []
    for item in items:
        asked = [*batch, item]
        longest = max(len(prompt) + len(response) for _, prompt, response in asked)
        kept = longest - min(len(prompt) for _, prompt, _ in asked)
        if batch and (len(asked) * longest > max_tokens or (max_logits and len(asked) * kept > max_logits)):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch
