"""Spans of a running server as a collector gets them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.fake_engine import Fault
from tests.server.live import LiveServer, live_server
from tests.server.tracing.collector import Collector, Taken, collector

SERVER, UNSET, ERROR = 2, 0, 2
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "xyzzy-the-secret"


@pytest.fixture(scope="module")
def collecting() -> Iterator[Collector]:
    with collector() as running:
        yield running


@pytest.fixture(scope="module")
def live(
    collecting: Collector, family: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    settings = {"telemetry": {"otlp_endpoint": collecting.url}}
    models = {"base": family / "base", "near": family / "near"}
    state = tmp_path_factory.mktemp("state")
    with live_server(state, models=models, root=family, settings=settings) as server:
        server.until_ready()
        yield server


@pytest.fixture
def taking(collecting: Collector) -> Collector:
    """The collector, which has forgotten what came before."""
    collecting.spans.clear()
    return collecting


def only(taking: Collector) -> Taken:
    [span] = taking.requests(1)
    return span


def test_answer_is_a_span_in_the_conventions_words(live: LiveServer, taking: Collector) -> None:
    asked = {"max_tokens": 4, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "seed": 7, "n": 2}
    sent_ns = time.time_ns()
    answer = live.complete("near", [5, 6, 7], **asked).json()
    span = only(taking)
    assert (span.name, span.kind, span.status) == ("text_completion near", SERVER, UNSET)
    assert sent_ns <= span.begun_ns < span.ended_ns <= time.time_ns()
    assert span.resource["service.name"] == "linker-llm"
    said = span.attributes
    assert said.pop("linker.request_id").startswith("req-")
    assert said.pop("gen_ai.response.id") == answer["id"]
    assert said == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": "/v1/completions",
        "url.path": "/v1/completions",
        "url.scheme": "http",
        "network.protocol.version": "1.1",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "linker",
        "gen_ai.request.model": "near",
        "gen_ai.response.model": "near",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 3,
        "gen_ai.request.seed": 7,
        "gen_ai.request.choice.count": 2,
        "gen_ai.response.finish_reasons": ["length", "length"],
        "gen_ai.usage.input_tokens": answer["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": answer["usage"]["completion_tokens"],
        "gen_ai.usage.cache_read.input_tokens": (
            answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        ),
    }


def test_stream_of_a_dialogue_is_one_span_with_its_phases(
    live: LiveServer, taking: Collector
) -> None:
    with live.client.stream(
        "POST",
        "/v1/chat/completions",
        json={
            "model": "near",
            "messages": [{"role": "user", "content": "hi"}],
            "stream": True,
            "max_completion_tokens": 3,
            "response_format": {"type": "text"},
            "variant_mode": "planned",
        },
    ) as response:
        text = response.read().decode()
    assert text.endswith("[DONE]\n\n")
    span = only(taking)
    assert span.name == "chat near"
    assert span.attributes["gen_ai.request.stream"] is True
    assert span.attributes["gen_ai.request.max_tokens"] == 3
    assert span.attributes["gen_ai.output.type"] == "text"
    assert span.attributes["linker.variant_mode"] == "planned"
    assert span.attributes["gen_ai.usage.output_tokens"] == 3
    waited_s = span.attributes["gen_ai.response.time_to_first_chunk"]
    phases = taking.inside(span)
    assert span.begun_ns + waited_s * 1e9 == pytest.approx(phases["decode"].begun_ns, abs=1e6)
    assert list(phases) == ["queue", "prefill", "decode"]
    queue, prefill, decode = phases.values()
    assert span.begun_ns <= queue.begun_ns <= queue.ended_ns == prefill.begun_ns
    assert prefill.begun_ns <= prefill.ended_ns == decode.begun_ns
    assert decode.begun_ns <= decode.ended_ns <= span.ended_ns
    assert {phase.trace_id for phase in phases.values()} == {span.trace_id}


def test_model_of_the_path_and_of_an_alias_are_told_apart(
    live: LiveServer, taking: Collector
) -> None:
    assert live.client.patch("/models/near", json={"alias": "close"}).status_code == 200
    live.client.post("/m/close/v1/completions", json={"prompt": [5], "max_tokens": 1})
    assert live.client.patch("/models/near", json={"alias": None}).status_code == 200
    spans = taking.requests(3)
    assert [span.name for span in spans] == [
        "PATCH /models/{name:path}",
        "text_completion near",
        "PATCH /models/{name:path}",
    ]
    said = spans[1].attributes
    assert said["url.path"] == "/m/close/v1/completions"
    assert said["http.route"] == "/v1/completions"
    assert said["gen_ai.request.model"] == "close"
    assert said["gen_ai.response.model"] == "near"


@pytest.mark.parametrize(
    ("model", "prompt", "status", "code"),
    [
        ("nobody", [5], 404, "model_not_found"),
        ("near", [5] * 300, 400, "context_length_exceeded"),
        ("near", [int(Fault.FAIL)], 500, "numerical_error"),
    ],
)
def test_refusal_says_its_code(
    live: LiveServer, taking: Collector, model: str, prompt: list[int], status: int, code: str
) -> None:
    assert live.complete(model, prompt, max_tokens=2).status_code == status
    span = only(taking)
    assert span.attributes["http.response.status_code"] == status
    assert span.attributes["error.type"] == code
    # What a client does wrong is no error of the server's.
    assert span.status == (ERROR if status >= 500 else UNSET)
    assert span.name == ("POST /v1/completions" if model == "nobody" else "text_completion near")


def test_stream_that_breaks_off_is_an_error(live: LiveServer, taking: Collector) -> None:
    body = {"model": "near", "prompt": [int(Fault.DIE)], "max_tokens": 9, "stream": True}
    with live.client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        response.read()
    span = only(taking)
    assert (span.status, span.status_message) == (ERROR, "engine_failure")
    assert span.attributes["error.type"] == "engine_failure"
    assert span.attributes["http.response.status_code"] == 200
    assert span.attributes["gen_ai.response.finish_reasons"] == ["error"]
    live.until_ready()


def test_client_that_leaves_is_no_fault(live: LiveServer, taking: Collector) -> None:
    body = {"model": "near", "prompt": [int(Fault.WAIT)], "max_tokens": 9, "stream": True}
    with live.client.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
    span = only(taking)
    assert span.status == UNSET
    assert span.attributes["gen_ai.response.finish_reasons"] == ["abort"]
    assert span.attributes["gen_ai.usage.output_tokens"] == 1


@pytest.mark.parametrize(
    ("tracestate", "state"), [("theirs=1,ours=2", "theirs=1,ours=2"), (f"a={'x' * 600}", "")]
)
def test_span_is_part_of_the_clients_trace(
    live: LiveServer, taking: Collector, tracestate: str, state: str
) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": tracestate}
    live.client.get("/v1/models", headers=headers)
    span = only(taking)
    assert (span.trace_id, span.parent_id, span.state) == (TRACE, PARENT, state)


def test_what_a_client_does_not_sample_is_not_written(live: LiveServer, taking: Collector) -> None:
    live.client.get("/v1/models", headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    live.client.get("/version")
    assert only(taking).name == "GET /version"


@pytest.mark.parametrize(
    "said",
    [
        [f"00-{'0' * 32}-{PARENT}-01"],
        [f"00-{TRACE}-{'0' * 16}-01"],
        [f"ff-{TRACE}-{PARENT}-01"],
        [f"00-{TRACE}-{PARENT}"],
        ["x" * 30_000],
        [f"cc-{TRACE}-{PARENT}-01-{'x' * 200}"],
        ["\xff\xfe"],
        [f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-01"],
    ],
    ids=["no trace", "no parent", "version", "short", "long", "future", "bytes", "twice"],
)
def test_bad_traceparent_begins_a_trace_of_its_own(
    live: LiveServer, taking: Collector, said: list[str]
) -> None:
    headers = [(b"traceparent", value.encode("latin-1")) for value in said]
    assert live.client.get("/version", headers=headers).status_code == 200
    span = only(taking)
    assert span.parent_id == ""
    assert span.trace_id != TRACE


def test_probes_are_not_written(live: LiveServer, taking: Collector) -> None:
    for path in ("/health", "/ready", "/metrics", "/version"):
        assert live.client.get(path).status_code == 200
    assert only(taking).name == "GET /version"


def test_nobody_makes_up_names_of_spans(live: LiveServer, taking: Collector) -> None:
    live.client.get("/nowhere/" + "x" * 1000)
    live.client.request("PROPFIND", "/version")
    first, second = taking.requests(2)
    assert (first.name, first.attributes["error.type"]) == ("GET", "not_found")
    assert len(first.attributes["url.path"]) == 256
    assert second.name == "HTTP /version"
    assert second.attributes["http.request.method"] == "_OTHER"


def test_no_text_of_a_request_is_sent_anywhere(live: LiveServer, taking: Collector) -> None:
    taking.bodies.clear()
    more = {"stop": [SECRET], "user": SECRET, "bad_words": [SECRET], "cache_salt": SECRET}
    headers = {"Authorization": f"Bearer {SECRET}", "User-Agent": SECRET}
    path = f"/v1/chat/completions?q={SECRET}"
    messages = [{"role": "user", "content": SECRET}]
    body = {"model": "near", "messages": messages, "max_tokens": 60, **more}
    answer = live.client.post(path, json=body, headers=headers).json()
    assert answer["usage"]["completion_tokens"] > 20  # which repeat the prompt
    bad = {"model": SECRET, "messages": messages}
    assert live.client.post(path, json=bad, headers=headers).status_code == 404
    worse = {"model": "near", SECRET: SECRET, "messages": SECRET}
    assert live.client.post(path, json=worse, headers=headers).status_code == 400
    taking.requests(3)
    assert not any(SECRET.encode() in sent for sent in taking.bodies)
    assert taking.paths == {"/v1/traces"}
