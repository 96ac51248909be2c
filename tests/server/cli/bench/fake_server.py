"""A server without an engine: `python -m tests.server.cli.bench.fake_server PORT`."""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar


class Answers(BaseHTTPRequestHandler):
    """Streams as many words as are asked for; the model's name says what goes wrong."""

    asked: ClassVar[list[dict[str, Any]]] = []

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append({"path": self.path, **body})
        if body["model"] == "unknown":
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()
        given = body["max_tokens"] - (body["model"] == "short")
        for _ in range(given):
            self._send({"choices": [{"text": " word"}], "usage": None})
        self._send({"choices": [{"text": ""}]})
        self._send({"choices": [], "usage": {"completion_tokens": given}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _send(self, event: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Answers).serve_forever()
