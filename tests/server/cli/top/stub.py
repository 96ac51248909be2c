"""A server that says what a test has it say, and hangs up when the test wants it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """What a request for events gets. Streams are kept open, anything else ends."""

    status: int = 200
    content_type: str = "text/event-stream"
    body: bytes = b""


class Stub:
    """What every next request gets, and when the streams that are open end."""

    def __init__(self) -> None:
        self.answer = Answer()
        self.hang_up = threading.Event()  # ends the streams that are open
        self.port = 0

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def says(self, *events: dict[str, Any]) -> None:
        """Has the next streams begin with events."""
        lines = (b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
        self.answer = Answer(body=b"".join(lines))


@contextmanager
def stub_server(stub: Stub) -> Iterator[Stub]:
    """Serves what a stub says until the block ends, on the stub's port once it has one."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hang_up, answer = stub.hang_up, stub.answer
            self.send_response(answer.status)
            self.send_header("content-type", answer.content_type)
            self.end_headers()
            self.wfile.write(answer.body)
            self.wfile.flush()
            if answer.status == 200:
                hang_up.wait(60)

        def log_message(self, *_args: Any, **_more: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        allow_reuse_address = True

    server = Server(("127.0.0.1", stub.port), Handler)
    stub.port = server.server_address[1]
    stub.hang_up = threading.Event()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield stub
    finally:
        stub.hang_up.set()
        server.shutdown()
        thread.join()
        server.server_close()
