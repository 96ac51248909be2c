"""An OpenTelemetry collector: it takes spans over OTLP/HTTP, and says what it has taken."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue

DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """One span as it came over the wire."""

    name: str
    kind: int
    trace_id: str
    span_id: str
    parent_id: str
    state: str  # the tracestate
    begun_ns: int
    ended_ns: int
    status: int  # 0 unset, 1 fine, 2 error
    status_message: str
    attributes: dict[str, Any]
    resource: dict[str, Any]


class Collector:
    """What has come, and what the next requests are answered with."""

    def __init__(self) -> None:
        self.spans: list[Taken] = []
        self.bodies: list[bytes] = []
        self.paths: set[str] = set()
        self.headers: list[dict[str, str]] = []
        self.answering = threading.Event()  # unset: requests are taken and not answered
        self.answering.set()
        self.url = ""

    def until(self, condition: Callable[[list[Taken]], bool]) -> list[Taken]:
        """Waits until the spans satisfy a condition."""
        give_up_at = time.monotonic() + DEADLINE_S
        while not condition(list(self.spans)):
            assert time.monotonic() < give_up_at, self.spans
            time.sleep(0.02)
        return list(self.spans)

    def requests(self, number: int) -> list[Taken]:
        """Waits for the spans of so many requests, and returns these in the order of their ends."""
        spans = self.until(lambda spans: sum(s.kind == 2 for s in spans) >= number)
        return sorted((s for s in spans if s.kind == 2), key=lambda span: span.ended_ns)

    def inside(self, span: Taken) -> dict[str, Taken]:
        """Returns what happened within a span, by name."""
        return {s.name: s for s in self.spans if s.parent_id == span.span_id}

    def take(self, body: bytes) -> None:
        """Decodes what was sent."""
        self.bodies.append(body)
        sent = ExportTraceServiceRequest.FromString(body)
        for group in sent.resource_spans:
            resource = {pair.key: _value(pair.value) for pair in group.resource.attributes}
            for scope in group.scope_spans:
                for span in scope.spans:
                    self.spans.append(
                        Taken(
                            name=span.name,
                            kind=span.kind,
                            trace_id=span.trace_id.hex(),
                            span_id=span.span_id.hex(),
                            parent_id=span.parent_span_id.hex(),
                            state=span.trace_state,
                            begun_ns=span.start_time_unix_nano,
                            ended_ns=span.end_time_unix_nano,
                            status=span.status.code,
                            status_message=span.status.message,
                            attributes={a.key: _value(a.value) for a in span.attributes},
                            resource=resource,
                        )
                    )


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(one) for one in value.array_value.values]
    return None if kind is None else getattr(value, kind)


@contextmanager
def collector() -> Iterator[Collector]:
    """Runs a collector until the block ends."""
    running = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            running.paths.add(self.path)
            running.headers.append({name.lower(): value for name, value in self.headers.items()})
            running.take(body)
            running.answering.wait(DEADLINE_S)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_args: Any, **_more: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    running.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield running
    finally:
        running.answering.set()
        server.shutdown()
        thread.join()
        server.server_close()
