"""A web server on 127.0.0.1 that misbehaves as the web does, for tests of `ingest`."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

KINDS = ("image", "missing", "slow", "redirect", "text", "small", "forbidden", "flaky")
"""What a path `/<kind>/<number>` answers: a picture, 404, nothing for `slow_seconds`, a redirect to a picture, no picture, a
picture of 8 × 8, a picture that forbids use, or 503 until `healed` is set."""


def picture(number: int, side: int = 48) -> bytes:
    """A JPEG that is different for every number."""
    random = np.random.default_rng(number)
    pixels = random.integers(0, 255, (4, 6, 3), np.uint8)
    stream = BytesIO()
    Image.fromarray(pixels).resize((side * 3 // 2, side), Image.Resampling.NEAREST).save(stream, "JPEG", quality=90)
    return stream.getvalue()


class WebServer(ThreadingHTTPServer):
    """Counts requests per path in `asked`; `files` maps further paths to (content type, bytes, headers)."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: Counter[str] = Counter()
        self.times: list[tuple[str, float]] = []
        self.files: dict[str, tuple[str, bytes, dict[str, str]]] = {}
        self.healed = False
        self.slow_seconds = 3.0
        self.delay_seconds = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is no fault of the test."""


class _Handler(BaseHTTPRequestHandler):
    server: WebServer

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        server, path = self.server, self.path.partition("?")[0]
        server.asked[path] += 1
        server.times.append((path, time.monotonic()))
        time.sleep(server.delay_seconds)
        if path in server.files:
            kind, data, headers = server.files[path]
            self._answer(200, data, kind, headers)
            return
        kind, _, number = path.strip("/").partition("/")
        seed = int(number) if number.isdigit() else 0
        if kind == "slow":
            time.sleep(server.slow_seconds)
        if kind == "redirect":
            self._answer(302, b"", "text/plain", {"Location": f"/image/{seed}"})
        elif kind == "text":
            self._answer(200, b"<html>not a picture</html>", "image/jpeg")
        elif kind == "small":
            self._answer(200, picture(seed, 8), "image/jpeg")
        elif kind == "forbidden":
            self._answer(200, picture(seed), "image/jpeg", {"X-Robots-Tag": "noai"})
        elif kind == "flaky" and not server.healed:
            self._answer(503, b"later", "text/plain")
        elif kind in ("image", "slow", "flaky"):
            self._answer(200, picture(seed), "image/jpeg")
        else:
            self._answer(404, b"no", "text/plain")

    def _answer(self, status: int, data: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def web_server() -> Iterator[WebServer]:
    """A running server on a free port of 127.0.0.1."""
    server = WebServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
