"""A teacher that vLLM or SGLang serves already: its log-probabilities are asked for over HTTP.

vLLM's OpenAI-compatible completions give `prompt_logprobs`, and SGLang's own /generate gives `input_token_logprobs`;
which of the two it is, the list of models says (`owned_by`). Prompts and responses go there as token ids. Neither gives
hidden states, so there is no `hidden`, and no decoding token by token.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import httpx
import torch
from transformers import AutoConfig

from configs.schema import TeacherConfig
from inference.attention.packing import within
from inference.model.files import context_of, end_ids
from inference.model.output_layer import fingerprint_of
from inference.protocol.fingerprint import load_tokenizer
from inference.protocol.replies import NONE, TeacherInfo
from inference.protocol.wire import Request, Unavailable, WireError

Item = TypeVar("Item")
Row = tuple[Sequence[int], Sequence[int]]
"""A prompt and a response."""
Scored = tuple[list[float], list[list[tuple[float, int]]]]
"""Of each response token its log-probability, and those of the likeliest entries with their ids, descending."""
AT_ONCE = 16
"""HTTP requests under way."""
ATTEMPTS, PAUSE_S = 4, 1.0
"""Times that a request is sent before the session is ended, and the first pause, which doubles. The client asks again
until teacher.timeout_s is over."""
SENTENCE = "Hvat eitur høvuðsstaðurin í Føroyum? Hann eitur Tórshavn."
NEUTRAL = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""Against what the server takes from the model's generation_config.json."""


class Endpoint:
    """One process that passes questions on, as `inference.model.backend.Backend` describes it."""

    def __init__(self, config: TeacherConfig, device: torch.device) -> None:
        """Raises ValueError with the mend where the server is not what config says."""
        self._config, self._path = config, Path(config.path)
        key = os.environ.get("OPENAI_API_KEY")
        self._http = httpx.Client(
            base_url=str(config.url).rstrip("/").removesuffix("/v1"),
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            timeout=config.timeout_s,
            limits=httpx.Limits(max_connections=AT_ONCE),
        )
        self._served = self._find_model()
        self._ask_scores = self._sglang_scores if self._served["owned_by"] == "sglang" else self._vllm_scores
        self._ask_answer = self._sglang_answer if self._served["owned_by"] == "sglang" else self._vllm_answer
        self._check_tokenizer()
        try:
            tokens = self._tokens(SENTENCE)
            self._score_rows([(tokens[:1], tokens[1:])], 0)
        except (Unavailable, WireError) as error:
            raise ValueError(f"teacher.url = {config.url!r}: {error}") from None

    @cached_property
    def info(self) -> TeacherInfo:
        """What clients may know."""
        text = AutoConfig.from_pretrained(self._path).get_text_config()
        served = self._served.get("max_model_len")
        # Both servers want to write a token behind what they score, and SGLang keeps one more free.
        served = served - 2 if isinstance(served, int) else None
        longest = [served, context_of(text.to_dict())]
        return TeacherInfo(
            model=self._served["id"],
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            dtype=self._config.dtype,
            max_positions=min((n for n in longest if isinstance(n, int) and n > 0), default=1 << 20),
            eos_ids=end_ids(self._path),
            tokenizer_fingerprint=fingerprint_of(self._path),
            output_layer=NONE,
        )

    def parameters(self) -> Iterable[tuple[str, torch.Tensor]]:
        """None here."""
        return ()

    def score(self, request: Request) -> list[torch.Tensor]:
        """Log-probabilities [S] of the response tokens."""
        return [torch.tensor([value for values, _ in self._scores(request, 0) for value in values])]

    def topk(self, request: Request) -> list[torch.Tensor]:
        """The K likeliest entries: log-probabilities [S, K] and ids [S, K]."""
        rows = [row for _, best in self._scores(request, request.k) for row in best]
        if any(len(row) < request.k for row in rows):
            raise WireError(f"the server at teacher.url gives fewer than {request.k} entries")
        values = torch.tensor([[value for value, _ in row[: request.k]] for row in rows]).view(-1, request.k)
        return [
            values,
            torch.tensor([[i for _, i in row[: request.k]] for row in rows], dtype=torch.int64).view_as(values),
        ]

    def answer(self, request: Request) -> list[torch.Tensor]:
        """An answer to each prompt, drawn by the server: with a seed on vLLM, without one on SGLang."""
        prompts = [group.prompt for group in request.groups]
        answers = self._at_once(
            lambda n: self._ended(_read("token ids of its answers", self._ask_answer, prompts[n], n, request), request),
            range(len(prompts)),
        )
        lengths = torch.tensor([len(answer) for answer in answers], dtype=torch.int64)
        return [lengths, torch.tensor([token for answer in answers for token in answer], dtype=torch.int64)]

    # --- what is asked ---------------------------------------------------------------------------------------------

    def _scores(self, request: Request, k: int) -> list[Scored]:
        """Of each response with tokens, in batch order."""
        if request.temperature != 1.0:
            raise WireError(f"temperature = {request.temperature}: the server at teacher.url scores at 1.0 alone")
        rows = [(g.prompt, r) for g in request.groups for r in g.responses if r]
        batches = within(rows, lambda row: len(row[0]) + len(row[1]), self._config.max_batch_tokens // AT_ONCE)
        found = self._at_once(lambda batch: self._score_rows(batch, k), batches)
        return [one for batch in found for one in batch]

    def _score_rows(self, rows: Sequence[Row], k: int) -> list[Scored]:
        return _read("log-probabilities of a prompt's tokens", self._ask_scores, rows, k)

    def _vllm_scores(self, rows: Sequence[Row], k: int) -> list[Scored]:
        asked = {"prompt": [[*p, *r] for p, r in rows], "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": k}
        choices = sorted(self._post("/v1/completions", {"model": self._served["id"], **asked})["choices"], key=_index)
        out = []
        for (_, response), choice in zip(rows, choices, strict=True):
            said = choice["prompt_logprobs"][-len(response) :]
            values = [float(entry[str(token)]["logprob"]) for entry, token in zip(said, response, strict=True)]
            best = [sorted(((float(e["logprob"]), int(i)) for i, e in entry.items()), reverse=True) for entry in said]
            out.append((values, best))
        return out

    def _sglang_scores(self, rows: Sequence[Row], k: int) -> list[Scored]:
        settings = {"max_new_tokens": 1, "temperature": 0.0}
        asked = {"input_ids": [[*p, *r] for p, r in rows], "sampling_params": settings, "return_logprob": True}
        starts = [max(len(prompt) - 1, 0) for prompt, _ in rows]
        found = self._post("/generate", {**asked, "logprob_start_len": starts, "top_logprobs_num": k})
        out = []
        for (_, response), one in zip(rows, found, strict=True):
            said = one["meta_info"]["input_token_logprobs"][-len(response) :]
            if [entry[1] for entry in said] != list(response):
                raise WireError("the server at teacher.url scored other tokens than it was sent")
            best = one["meta_info"]["input_top_logprobs"][-len(response) :] if k else [[] for _ in response]
            out.append(([float(entry[0]) for entry in said], [[(float(e[0]), int(e[1])) for e in row] for row in best]))
        return out

    def _vllm_answer(self, prompt: Sequence[int], n: int, request: Request) -> list[int]:
        asked = {"prompt": list(prompt), "max_tokens": request.max_new_tokens, "temperature": request.temperature}
        asked |= {"seed": request.streams[n], "stop_token_ids": list(request.ids), "return_token_ids": True, **NEUTRAL}
        (choice,) = self._post("/v1/completions", {"model": self._served["id"], **asked})["choices"]
        return [*choice["token_ids"], *(end for end in [choice.get("stop_reason")] if end in request.ids)]

    def _sglang_answer(self, prompt: Sequence[int], n: int, request: Request) -> list[int]:
        settings = {"max_new_tokens": request.max_new_tokens, "temperature": request.temperature, **NEUTRAL}
        asked = {"input_ids": list(prompt), "sampling_params": {**settings, "stop_token_ids": list(request.ids)}}
        found = self._post("/generate", asked)
        matched = found["meta_info"]["finish_reason"].get("matched")
        return [*found["output_ids"], *(end for end in [matched] if end in request.ids)]

    def _ended(self, tokens: Sequence[int], request: Request) -> list[int]:
        """Cut behind the first end: servers differ in whether the end is among the tokens that they give."""
        end = next((i + 1 for i, token in enumerate(tokens) if token in request.ids), len(tokens))
        return list(tokens[: min(end, request.max_new_tokens)])

    # --- HTTP ------------------------------------------------------------------------------------------------------

    def _at_once(self, ask: Callable[[Item], Any], items: Iterable[Item]) -> list[Any]:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(ask, items))

    def _post(self, route: str, body: dict[str, Any]) -> Any:
        """The reply's JSON. Unavailable where the server does not answer now, WireError where it refuses."""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(PAUSE_S * 2 ** (attempt - 1))
            try:
                reply = self._http.post(route, json=body)
            except httpx.TransportError as error:
                why = f"{type(error).__name__}: {error}"
                continue
            if reply.status_code == 200:
                return reply.json()
            why = f"{route}: status {reply.status_code}: {' '.join(reply.text.split())[:300]}"
            if reply.status_code < 500 and reply.status_code not in (408, 429):
                raise WireError(f"the server at teacher.url refuses {why}")
        raise Unavailable(f"the server at teacher.url does not answer ({why})")

    def _find_model(self) -> dict[str, Any]:
        """The model's entry in the server's list."""
        key = "teacher.url"
        try:
            listed = self._http.get("/v1/models").raise_for_status().json()["data"]
            names = [entry["id"] for entry in listed]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            said = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{key} = {self._config.url!r}: /v1/models is not answered ({said}); give the address of vLLM or "
                "SGLang, and its key, where it has one, in OPENAI_API_KEY"
            ) from None
        name = self._config.served_name or next(iter(names), "")
        if name not in names or (self._config.served_name is None and len(names) > 1):
            serves = ", ".join(names) or "nothing"
            raise ValueError(f"teacher.served_name = {self._config.served_name!r}: it serves {serves}; name one")
        return {"owned_by": "", **listed[names.index(name)]}

    def _tokens(self, text: str) -> list[int]:
        return list(load_tokenizer(self._path)(text, add_special_tokens=False)["input_ids"])

    def _check_tokenizer(self) -> None:
        """The server cuts text as the tokenizer in `path` does, where it can be asked (both servers' /tokenize)."""
        body = {"model": self._served["id"], "prompt": SENTENCE, "add_special_tokens": False}
        try:
            theirs = self._http.post("/tokenize", json=body).raise_for_status().json()["tokens"]
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return
        if theirs != self._tokens(SENTENCE):
            raise ValueError(
                f"teacher.path = {self._config.path!r}: its tokenizer is not that of {self._served['id']!r} at "
                f"{self._config.url}; give the directory or hub id of the model that is served"
            )


def _read(what: str, ask: Callable[..., Any], *asked: Any) -> Any:
    """What `ask` finds in the server's reply; a WireError that names `what` where it is not there."""
    try:
        return ask(*asked)
    except WireError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise WireError(f"the server at teacher.url gives no {what} ({why}); vLLM and SGLang of today do") from None


def _index(choice: dict[str, Any]) -> int:
    return int(choice["index"])
