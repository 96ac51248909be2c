"""When spans are written, how many, and what happens to them when nobody takes them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from server.settings import TelemetrySettings
from server.tracing.request import AnswerTrace, RequestTrace
from server.tracing.spans import OtlpSpans
from server.tracing.writer import open_writer
from tests.server.live import live_server
from tests.server.tracing.collector import Collector, collector

# The share of trace ids that is taken begins with the lowest: of their last eight bytes.
LOW, HIGH = f"{'a' * 16}{1:016x}", f"{'a' * 16}{2**64 - 1:016x}"


def finished(traceparent: str | None = None, *, answer: AnswerTrace | None = None) -> RequestTrace:
    now = time.monotonic()
    return RequestTrace(
        method="GET",
        path="/version",
        scheme="http",
        http_version="1.1",
        traceparent=traceparent,
        tracestate=None,
        arrived_ns=time.time_ns(),
        arrived_at=now,
        ended_at=now + 1.0,
        route="/version",
        status=200,
        answer=answer,
    )


def answer() -> AnswerTrace:
    return AnswerTrace(
        operation="chat", asked_model="near", model="near", response_id="chatcmpl-1", options={}
    )


def writer(taking: Collector, **more: float) -> OtlpSpans:
    return OtlpSpans(TelemetrySettings(otlp_endpoint=taking.url, **more))


def closed(spans: OtlpSpans, *, within_s: float = 60.0) -> None:
    asyncio.run(spans.close(within_s=within_s))


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_without_a_collector_nothing_of_opentelemetry_is_imported() -> None:
    done = python(
        "import sys, server.cli.serve\n"
        "from server.settings import Settings\n"
        "from server.tracing.writer import open_writer\n"
        "assert open_writer(Settings().telemetry) is None\n"
        # FastAPI brings the bare interface along, which writes nothing.
        "heavy = ('opentelemetry.sdk', 'opentelemetry.exporter', 'google.protobuf')\n"
        "sys.exit(any(name.startswith(heavy) for name in sys.modules))"
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_server_without_the_extra_says_what_is_missing(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("telemetry: {otlp_endpoint: 'http://127.0.0.1:4318'}")
    done = python(
        "import sys\n"
        "sys.modules['opentelemetry.sdk'] = None\n"  # as if it were not installed
        "from server.cli.main import main\n"
        f"sys.exit(main(['serve', '--port', '0', '--config', {str(config)!r}, '--state', "
        f"{str(tmp_path / 'state')!r}]))"
    )
    assert done.returncode == 2
    [said] = [line for line in done.stderr.splitlines() if line.startswith("linker serve: ")]
    assert "pip install '.[otel]'" in said
    assert not (tmp_path / "state").exists()
    assert "Traceback" not in done.stderr


def test_nothing_else_writes_spans_of_its_own(
    monkeypatch: pytest.MonkeyPatch, family: Path, tmp_path: Path
) -> None:
    # FastAPI would, with addresses, queries and what is wrong with requests, to any provider that
    # the process has.
    kept, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(kept))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    with live_server(tmp_path, models={"base": family / "base"}, root=family) as live:
        live.until_ready()
        assert live.complete("base", [5, 6], max_tokens=2).status_code == 200
        assert live.client.get("/models/base", params={"include": "x"}).status_code == 400
    assert kept.get_finished_spans() == ()


def test_settings_name_a_collector_or_nobody() -> None:
    assert open_writer(TelemetrySettings()) is None
    for bad in ("127.0.0.1:4318", "grpc://x", "http://user:secret@x", "http://x/?q"):
        with pytest.raises(ValueError, match="begin with http:// or https://") as raised:
            TelemetrySettings(otlp_endpoint=bad)
        assert "otlp_endpoint" in str(raised.value)
        assert "[A-Za-z" not in str(raised.value)


def test_what_is_still_to_be_sent_is_sent_at_the_end() -> None:
    with collector() as taking:
        spans = writer(taking)
        for _ in range(300):
            spans.write(finished())
        closed(spans)
        assert len(taking.spans) == 300


def test_server_that_stops_sends_the_last_spans(family: Path, tmp_path: Path) -> None:
    with collector() as taking:
        settings = {"telemetry": {"otlp_endpoint": taking.url + "/"}}
        models = {"base": family / "base"}
        with live_server(tmp_path, models=models, root=family, settings=settings) as live:
            live.until_ready()
            live.complete("base", [5, 6], max_tokens=2)
        assert [span.name for span in taking.requests(1)] == ["text_completion base"]
        assert taking.paths == {"/v1/traces"}


def test_collector_that_takes_nothing_holds_up_no_end(caplog: pytest.LogCaptureFixture) -> None:
    with collector() as taking:
        taking.answering.clear()
        spans = writer(taking)
        spans.write(finished())
        closed(spans, within_s=0.1)
        assert "the collector did not take them" in caplog.text


def test_collector_that_is_down_costs_no_request_and_few_words(
    caplog: pytest.LogCaptureFixture, family: Path, tmp_path: Path
) -> None:
    with collector() as taking:
        pass
    settings = {"telemetry": {"otlp_endpoint": taking.url}}
    models = {"base": family / "base"}
    with live_server(tmp_path, models=models, root=family, settings=settings) as live:
        live.until_ready()
        for _ in range(20):
            assert live.complete("base", [5, 6], max_tokens=2).status_code == 200
        live.until(lambda: "spans are lost" in caplog.text)
    # The rest is sent at the end, and is lost, too.
    port = taking.url.rpartition(":")[2]
    [complaint] = [r.getMessage() for r in caplog.records if port in r.getMessage()]
    assert not [r for r in caplog.records if r.name.startswith("opentelemetry")]
    assert complaint == f"spans are lost: {taking.url}/v1/traces does not take them, or too slowly"


def test_spans_that_find_no_room_are_said_to_be_lost(caplog: pytest.LogCaptureFixture) -> None:
    with collector() as taking:
        taking.answering.clear()
        spans = writer(taking)
        for _ in range(6000):
            spans.write(finished())
        said = [r.getMessage() for r in caplog.records if taking.url in r.getMessage()]
        assert [one[:15] for one in said] == ["spans are lost:"]
        taking.answering.set()
        closed(spans)


def test_spans_that_nobody_takes_are_lost_and_not_kept() -> None:
    with collector() as taking:
        taking.answering.clear()
        spans = writer(taking)
        for _ in range(6000):
            spans.write(finished())
        taking.answering.set()
        closed(spans)
        assert 4096 <= len(taking.spans) < 6000


@pytest.mark.parametrize(("ratio", "taken"), [(0.0, []), (0.5, [LOW]), (1.0, [HIGH, LOW])])
def test_a_share_of_the_requests_is_written(ratio: float, taken: list[str]) -> None:
    with collector() as taking:
        spans = writer(taking, sample_ratio=ratio)
        for trace_id in (HIGH, LOW):
            spans.write(finished(f"00-{trace_id}-{'b' * 16}-01"))
        spans.write(finished(f"00-{LOW}-{'b' * 16}-00"))  # which whoever asks does not sample
        closed(spans)
        assert [span.trace_id for span in taking.spans] == taken


def test_share_is_also_of_requests_that_begin_a_trace() -> None:
    with collector() as taking:
        spans = writer(taking, sample_ratio=0.5)
        waiting = replace(answer(), submitted_at=time.monotonic())
        for _ in range(400):
            spans.write(finished(answer=waiting))
        closed(spans)
        requests = [span for span in taking.spans if span.kind == 2]
        assert 100 < len(requests) < 300  # 10 standard deviations each way
        assert len(taking.spans) == 2 * len(requests)  # each with its queue, or not at all


@pytest.mark.parametrize(
    ("answered", "phases"),
    [
        (answer(), {}),
        (replace(answer(), submitted_at=1.0), {"queue": (1.0, 9.0)}),  # refused after a wait
        (
            replace(
                answer(), submitted_at=1.0, begun_at=2.0, first_token_at=4.0, last_token_at=8.0
            ),
            {"queue": (1.0, 2.0), "prefill": (2.0, 4.0), "decode": (4.0, 8.0)},
        ),
    ],
    ids=["none", "queue", "all"],
)
def test_phases_follow_one_another(
    answered: AnswerTrace, phases: dict[str, tuple[float, float]]
) -> None:
    with collector() as taking:
        spans = writer(taking)
        trace = replace(finished(answer=answered), arrived_at=0.0, ended_at=9.0)
        spans.write(trace)
        closed(spans)
        [request] = taking.requests(1)
        found = {
            name: tuple(round((at - trace.arrived_ns) / 1e9, 6) for at in (s.begun_ns, s.ended_ns))
            for name, s in taking.inside(request).items()
        }
    assert found == phases
