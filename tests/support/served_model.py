"""A small HTTP server that speaks what vLLM and SGLang document of scoring prompts, with a transformers model behind.

Shapes of requests and replies: vLLM's CompletionRequest (`prompt_logprobs`, `return_token_ids`), SGLang's /generate.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

Fault = Callable[[str, dict[str, Any]], tuple[int, str] | None]
"""From route and request to a status and text in place of the reply."""


class ServedModel:
    """Serves a model directory as `kind`; use as a context manager."""

    def __init__(self, path: Path, kind: str = "vllm", names: tuple[str, ...] = ("teacher",)) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(path)
        self.kind, self.names, self.most = kind, names, 20
        self.context = 512
        self.fault: Fault = lambda route, body: None
        self.requests: list[tuple[str, dict[str, Any]]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                listed = [{"id": name, "owned_by": outer.kind, "max_model_len": outer.context} for name in outer.names]
                self._send(200, json.dumps({"object": "list", "data": listed}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, body))
                fault = outer.fault(self.path, body)
                if fault is not None:
                    self._send(*fault)
                    return
                answer = {
                    "/tokenize": outer.tokenize,
                    "/v1/completions": outer.completions,
                    "/generate": outer.generate,
                }
                self._send(200, json.dumps(answer[self.path](body)))

            def _send(self, status: int, text: str) -> None:
                data = text.encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> ServedModel:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def tokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        tokens = self._tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
        return {"tokens": tokens, "count": len(tokens)}

    def completions(self, body: dict[str, Any]) -> dict[str, Any]:
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        choices = []
        for n, tokens in enumerate(prompts):
            ends = body.get("stop_token_ids", [])
            made = self._generate(tokens, body["max_tokens"], ends)
            choice: dict[str, Any] = {"index": n, "token_ids": made, "finish_reason": "length", "stop_reason": None}
            if made[-1] in ends:
                choice |= {"finish_reason": "stop", "stop_reason": made[-1]}
            if (k := body.get("prompt_logprobs")) is not None:
                choice["prompt_logprobs"] = [None, *self._entries(tokens, k)]
            choices.append(choice)
        return {"choices": choices[::-1]}  # the order is `index`'s

    def generate(self, body: dict[str, Any]) -> Any:
        many = isinstance(body["input_ids"][0], list)
        rows, settings = body["input_ids"] if many else [body["input_ids"]], body["sampling_params"]
        out = []
        for n, tokens in enumerate(rows):
            made = self._generate(tokens, settings["max_new_tokens"], settings.get("stop_token_ids", []))
            stopped = made[-1] in settings.get("stop_token_ids", [])
            reason = {"type": "stop", "matched": made[-1]} if stopped else {"type": "length"}
            meta: dict[str, Any] = {"finish_reason": reason}
            if body.get("return_logprob"):
                start, k = body["logprob_start_len"][n], body["top_logprobs_num"]
                logprobs = self._logprobs(tokens)
                chosen = [[None, tokens[0], None]]
                chosen += [[float(row[t]), t, None] for row, t in zip(logprobs, tokens[1:], strict=True)]
                tops: list[Any] = [None]
                for row in logprobs:
                    best = row.topk(k) if k else None
                    tops.append(
                        None if best is None else [[float(v), int(i), None] for v, i in zip(*best, strict=True)]
                    )
                meta |= {"input_token_logprobs": chosen[start:], "input_top_logprobs": tops[start:]}
            out.append({"text": "", "output_ids": made, "meta_info": meta})
        return out if many else out[0]

    @torch.no_grad()
    def _logprobs(self, tokens: list[int]) -> torch.Tensor:
        return self._model(torch.tensor([tokens])).logits[0, :-1].float().log_softmax(-1)

    def _entries(self, tokens: list[int], k: int) -> list[dict[str, Any]]:
        out = []
        for row, token in zip(self._logprobs(tokens), tokens[1:], strict=True):
            kept = [token, *(row.topk(k).indices.tolist() if k else [])]
            out.append({str(i): {"logprob": float(row[i]), "rank": int((row > row[i]).sum()) + 1} for i in kept})
        return out

    @torch.no_grad()
    def _generate(self, tokens: list[int], most: int, ends: list[int]) -> list[int]:
        made: list[int] = []
        while len(made) < most and not (made and made[-1] in ends):
            made.append(int(self._model(torch.tensor([[*tokens, *made]])).logits[0, -1].argmax()))
        return made
