"""A local stand-in of the Hugging Face hub's API, as far as creating a repository and committing files to it goes."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_REPOSITORY = re.compile(r"/api/(datasets|models)/")


class Hub(ThreadingHTTPServer):
    """Keeps what was created (`repositories`: name → request) and committed (`files`: repository → path → content)."""

    daemon_threads = True

    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token = token
        self.repositories: dict[str, dict[str, Any]] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.unknown: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def _answer(self, status: int, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self) -> None:
        self._handle(b"")

    def do_POST(self) -> None:
        self._handle(self._body())

    def _handle(self, body: bytes) -> None:
        path = self.path.partition("?")[0]
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self._answer(401, {"error": "Invalid user token"})
        elif path == "/api/repos/create":
            request = json.loads(body)
            name = f"{request['organization']}/{request['name']}" if request.get("organization") else request["name"]
            self.server.repositories[name] = request
            self._answer(200, {"url": f"{self.server.url}/datasets/{name}"})
        elif _REPOSITORY.match(path) and "/preupload/" in path:
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            self._answer(200, {"files": files})
        elif _REPOSITORY.match(path) and "/commit/" in path:
            repository = _REPOSITORY.sub("", path).partition("/commit/")[0]
            stored = self.server.files.setdefault(repository, {})
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    stored[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self._answer(200, {"commitUrl": f"{self.server.url}/datasets/{repository}/commit/1", "commitOid": "1" * 40})
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif _REPOSITORY.match(path):
            self._answer(200, {"id": _REPOSITORY.sub("", path).partition("/revision/")[0], "sha": "0" * 40, "siblings": []})
        else:
            self.server.unknown.append(f"{self.command} {path}")
            self._answer(404, {"error": "not found"})


@contextmanager
def hub(token: str = "hf_test") -> Iterator[Hub]:
    """A running stand-in on a free port of 127.0.0.1."""
    server = Hub(token)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
