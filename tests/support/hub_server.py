"""A small server that plays the Hugging Face hub: what `datasets` and `huggingface_hub` ask of data sets and models."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

REVISION = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves FOLDER/ORG/NAME/* as data sets and models; those in `down` get 503, in `gated` 403. `asked` has every
    request."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []
        self.down: set[str] = set()
        self.gated: set[str] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_POST = do_GET

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        length = int(request.headers.get("Content-Length") or 0)
        body = request.rfile.read(length).decode() if length else ""
        path = request.path.split("?")[0]
        self.asked.append(f"{request.command} {path}")
        parts = path.strip("/").split("/")
        if parts[0] == "api" and parts[1] in ("datasets", "models") and len(parts) >= 4:
            name, rest = "/".join(parts[2:4]), parts[4:]
        elif parts[0] == "datasets" and len(parts) >= 5:
            name, rest = "/".join(parts[1:3]), parts[3:]
        elif len(parts) >= 5 and parts[2] == "resolve":
            name, rest = "/".join(parts[:2]), parts[2:]
        else:
            return self.say(request, 404, b"")
        place = self.folder / name
        if name in self.down:
            return self.say(request, 503, b"the hub is down")
        if name in self.gated:
            return self.say(request, 403, b"", {"X-Error-Code": "GatedRepo"})
        if not place.is_dir():
            return self.say(request, 404, b"", {"X-Error-Code": "RepoNotFound"})
        files = sorted(file.name for file in place.iterdir())
        if parts[0] == "api" and (not rest or rest[0] == "revision"):
            info = {
                "id": name, "sha": REVISION, "private": False, "gated": False, "disabled": False, "tags": [],
                "downloads": 0, "likes": 0, "siblings": [{"rfilename": file} for file in files],
            }  # fmt: skip
            return self.say(request, 200, json.dumps(info).encode())
        if parts[0] == "api" and rest[0] in ("tree", "paths-info"):
            if rest[0] == "paths-info":
                wanted = json.loads(body)["paths"] if body.startswith("{") else []
                files = [file for file in files if file in wanted]
            entries = [self.entry(place / file) for file in files]
            return self.say(request, 200, json.dumps(entries).encode())
        if rest[0] == "resolve" and (place / rest[-1]).is_file():
            content = (place / rest[-1]).read_bytes()
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": REVISION}
            return self.say(request, 200, content, headers)
        return self.say(request, 404, b"", {"X-Error-Code": "EntryNotFound"})

    @staticmethod
    def entry(file: Path) -> dict[str, Any]:
        content = file.read_bytes()
        return {"type": "file", "path": file.name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    @staticmethod
    def say(request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        request.send_response(status)
        for key, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)
