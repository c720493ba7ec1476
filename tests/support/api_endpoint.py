"""A small OpenAI-compatible endpoint for tests, with the faults that real ones have.

    python tests/support/api_endpoint.py LOG     prints its port; every finished reply's question is appended to LOG.
                                                 Of questions that end with a number 20 to 27 get no reply at first

What happens to a request is asked of `plan`: for the n-th request (from 0) of a question, "ok" or the name of a fault.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Endpoint:
    """Answers `svar: QUESTION` (a judge's mark where the system message asks for one); use as a context manager."""

    def __init__(self, plan: Callable[[str, int], str] = lambda question, n: "ok", log: Path | None = None) -> None:
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.times: list[float] = []
        self.keys: set[str] = set()
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                question = body["messages"][-1]["content"]
                with lock:
                    turn = outer.asked[question]
                    outer.asked[question] += 1
                    outer.times.append(time.monotonic())
                    outer.keys.add(self.headers["Authorization"])
                fault = plan(question, turn)
                if fault == "ok":
                    self._send(200, completion(question, judge="judge" in body["messages"][0]["content"]))
                    with lock:
                        outer.answered[question] += 1
                        if log is not None:
                            with log.open("a") as file:
                                file.write(json.dumps(question) + "\n")
                else:
                    FAULTS[fault](self)

            def _send(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
                data = text.encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:  # a client that is killed or gives up
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def __enter__(self) -> Endpoint:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def completion(question: str, judge: bool) -> str:
    """A chat completion of 10 + 3 tokens."""
    content = 'Well: {"mark": 7}' if judge else f"svar: {question}"
    return json.dumps(
        {
            "id": "x", "object": "chat.completion", "created": 0, "model": "m",
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13},
        }
    )  # fmt: skip


def _hang(_: Any) -> None:
    time.sleep(3.0)  # the client's patience is shorter


def _half_close(handler: Any) -> None:
    """Promise 500 bytes, send 20, and shut the sending half of the connection."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "500")
    handler.end_headers()
    handler.wfile.write(completion("half", False)[:20].encode())
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_WR)
    handler.close_connection = True


def _close(handler: Any) -> None:
    """End the connection without a word."""
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


FAULTS: dict[str, Callable[[Any], None]] = {
    "500": lambda handler: handler._send(500, '{"error": {"message": "broken"}}'),
    "503": lambda handler: handler._send(503, "<html>busy</html>"),
    "429": lambda handler: handler._send(429, '{"error": {"message": "slow down"}}', {"Retry-After": "0.3"}),
    "401": lambda handler: handler._send(401, '{"error": {"message": "no such key"}}'),
    "time-out": _hang,
    "malformed": lambda handler: handler._send(200, '{"choices": [{"message": {"content": "cut'),
    "no choices": lambda handler: handler._send(200, '{"choices": []}'),
    "not an object": lambda handler: handler._send(200, '"hello"'),
    "empty": lambda handler: handler._send(200, completion("", False).replace("svar: ", "")),
    "half-closed": _half_close,
    "closed": _close,
}


if __name__ == "__main__":

    def plan(question: str, n: int) -> str:
        if n == 0 and 20 <= int(question.split()[-1]) < 28:
            time.sleep(600)
        return "ok"

    with Endpoint(plan, Path(sys.argv[1])) as endpoint:
        print(endpoint.url, flush=True)
        sys.stdin.read()
