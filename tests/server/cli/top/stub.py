"""A server that says what a test has it say, and hangs up when the test wants it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Stub:
    """What every next request for events gets: a status and a body, kept open or cut."""

    def __init__(self) -> None:
        self.status = 200
        self.content_type = "text/event-stream"
        self.body = b""
        self.hang_up = threading.Event()  # ends the streams that are open
        self.num_requests = 0
        self.port = 0

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def says(self, *events: dict[str, Any]) -> None:
        """Has the next streams begin with events."""
        self.body = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)


@contextmanager
def stub_server(stub: Stub) -> Iterator[Stub]:
    """Serves what a stub says until the block ends, on the stub's port once it has one."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            stub.num_requests += 1
            hang_up = stub.hang_up
            self.send_response(stub.status)
            self.send_header("content-type", stub.content_type)
            self.end_headers()
            self.wfile.write(stub.body)
            self.wfile.flush()
            if stub.status == 200:
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
