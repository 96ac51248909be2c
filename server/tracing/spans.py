"""Requests as spans, sent to a collector over OTLP/HTTP by a thread of its own.

The only file that needs the extra `otel`; nothing imports it unless spans are wanted.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.metadata import version
from itertools import pairwise

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from server.settings import TelemetrySettings
from server.tracing.attributes import (
    answer_attributes,
    error_of,
    is_our_fault,
    request_attributes,
    span_name,
)
from server.tracing.request import AnswerTrace, RequestTrace

logger = logging.getLogger(__name__)

_SERVICE = "linker-llm"
_PATH = "/v1/traces"
_SEND_TIMEOUT_S = 5.0
_MAX_WAITING = 4096  # spans; what comes while so many wait is lost
# A batch is encoded at a stretch: a hundred spans take some 3 ms, for which answers wait.
_BATCH = 128
_DELAY_S = 1.0
_QUIET_S = 60.0  # between two complaints
# Of the library. The sender writes pages, also of what it tries again; what is lost, it returns.
_SENDER, _QUEUE = "opentelemetry.exporter", "opentelemetry.sdk._shared_internal"
_NEVER = logging.CRITICAL + 1
_MAX_PARENT_CHARS = 128  # of a traceparent; those of today have 55
_MAX_STATE_CHARS = 512


class _Complaint(logging.Filter):
    """Says in a line that spans are lost, once a minute at most, in place of what the library says.

    Args:
        url: Of whoever does not take them.
    """

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url
        self._saying = threading.Lock()  # of the loop and of the thread that sends
        self._quiet_until = float("-inf")

    def filter(self, record: logging.LogRecord) -> bool:
        """Takes what the queue says: that it is full."""
        if record.levelno >= logging.WARNING:
            self.say()
        return False

    def say(self) -> None:
        """Says it, unless it has been said."""
        with self._saying:
            now = time.monotonic()
            if now < self._quiet_until:
                return
            self._quiet_until = now + _QUIET_S
        logger.warning("spans are lost: %s does not take them, or too slowly", self._url)


class _Exporter(OTLPSpanExporter):
    """Sends spans, and says when it could not."""

    def __init__(self, url: str, complaint: _Complaint) -> None:
        super().__init__(endpoint=url, timeout=_SEND_TIMEOUT_S)
        self._complaint = complaint

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = super().export(spans)
        if result is not SpanExportResult.SUCCESS:
            self._complaint.say()
        return result


class OtlpSpans:
    """Writes spans; what the collector does not take in time is lost, and nobody waits for it.

    Args:
        settings: Where to, and how many.
    """

    def __init__(self, settings: TelemetrySettings) -> None:
        assert settings.otlp_endpoint is not None
        ratio = TraceIdRatioBased(settings.sample_ratio)
        self._provider = TracerProvider(
            # Whoever asks may spare us a span, but not have more of them than the settings allow.
            sampler=ParentBased(ratio, remote_parent_sampled=ratio),
            resource=Resource.create(
                {"service.name": _SERVICE, "service.version": version("linker-llm")}
            ),
            shutdown_on_exit=False,  # `close` does it, and in time
        )
        url = settings.otlp_endpoint.rstrip("/") + _PATH
        self._complaint = _Complaint(url)
        self._provider.add_span_processor(
            BatchSpanProcessor(
                _Exporter(url, self._complaint),
                max_queue_size=_MAX_WAITING,
                max_export_batch_size=_BATCH,
                schedule_delay_millis=_DELAY_S * 1000,
            )
        )
        logging.getLogger(_SENDER).setLevel(_NEVER)  # nobody else in this process sends
        logging.getLogger(_QUEUE).addFilter(self._complaint)
        self._tracer = self._provider.get_tracer("linker", version("linker-llm"))
        self._propagator = TraceContextTextMapPropagator()

    def write(self, trace: RequestTrace) -> None:
        """Makes the spans of a request that is over, and leaves them to the thread that sends."""
        span = self._tracer.start_span(
            span_name(trace),
            context=self._parent(trace),
            kind=SpanKind.SERVER,
            start_time=trace.arrived_ns,
        )
        if not span.is_recording():
            return
        span.set_attributes(request_attributes(trace))
        if trace.answer is not None:
            said = answer_attributes(trace.answer, arrived_at=trace.arrived_at)
            span.set_attributes(said)
            self._write_phases(span, trace, trace.answer)
        if is_our_fault(trace):
            span.set_status(Status(StatusCode.ERROR, error_of(trace)))
        span.end(trace.since_epoch_ns(trace.ended_at))

    async def close(self, *, within_s: float) -> None:
        """Sends what is still to be sent, for so long at most."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def shut_down() -> None:
            self._provider.shutdown()
            with suppress(RuntimeError):  # nobody waits any more, and the loop is closed
                loop.call_soon_threadsafe(done.set)

        # A thread that the interpreter does not wait for at its end.
        threading.Thread(target=shut_down, name="spans-close", daemon=True).start()
        try:
            async with asyncio.timeout(within_s):
                await done.wait()
        except TimeoutError:
            logger.warning("spans were lost: the collector did not take them in %.0f s", within_s)
        logging.getLogger(_QUEUE).removeFilter(self._complaint)

    def _parent(self, trace: RequestTrace) -> Context:
        """Returns the span that a request says it is part of, or none; ids alone are taken."""
        parent, state = trace.traceparent, trace.tracestate
        carrier: dict[str, str] = {}
        if parent is not None and len(parent) <= _MAX_PARENT_CHARS:
            carrier["traceparent"] = parent
            if state is not None and len(state) <= _MAX_STATE_CHARS:
                carrier["tracestate"] = state
        return self._propagator.extract(carrier, Context())

    def _write_phases(self, span: Span, trace: RequestTrace, answer: AnswerTrace) -> None:
        inside = set_span_in_context(span, Context())
        for name, begun_at, ended_at in _phases(answer, trace.ended_at):
            phase = self._tracer.start_span(
                name, context=inside, start_time=trace.since_epoch_ns(begun_at)
            )
            phase.end(trace.since_epoch_ns(ended_at))


def _phases(answer: AnswerTrace, ended_at: float) -> Iterator[tuple[str, float, float]]:
    """Yields name, beginning and end of what an answer went through; the last may be cut off."""
    moments = (
        ("queue", answer.submitted_at),
        ("prefill", answer.begun_at),
        ("decode", answer.first_token_at),
        ("", answer.last_token_at),
    )
    come = [(name, at) for name, at in moments if at is not None]
    if come and answer.last_token_at is None:
        come.append(("", ended_at))
    for (name, begun_at), (_, until) in pairwise(come):
        yield name, begun_at, until
