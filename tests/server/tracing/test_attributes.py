"""The names that spans carry, against OpenTelemetry's own list of them."""

from __future__ import annotations

from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv.attributes import (
    error_attributes,
    http_attributes,
    network_attributes,
    url_attributes,
)

from server.tracing import attributes
from server.tracing.attributes import answer_attributes, request_attributes
from server.tracing.request import AnswerTrace, RequestTrace

KNOWN = {
    value
    for module in (
        gen_ai_attributes, error_attributes, http_attributes, network_attributes, url_attributes,
    )
    for name, value in vars(module).items()
    if name.isupper() and isinstance(value, str)
}  # fmt: skip
ANSWER = AnswerTrace(
    operation="chat",
    asked_model="near",
    model="near",
    response_id="chatcmpl-1",
    options=dict.fromkeys(attributes._OPTIONS, 1),
    submitted_at=1.0,
    first_token_at=2.0,
    usage={"input_tokens": 1, "output_tokens": 2, "cached_tokens": 0},
)


def test_every_name_is_of_the_conventions_or_ours() -> None:
    answered = answer_attributes(ANSWER, arrived_at=0.5)
    assert answered["gen_ai.response.time_to_first_chunk"] == 1.5
    said = {**request_attributes(trace(status=500)), **answered}
    ours = {name for name in said if name.startswith("linker.")}
    assert set(said) - ours <= KNOWN
    assert ours == {"linker.request_id", "linker.variant_mode"}


def trace(**more: object) -> RequestTrace:
    known: dict[str, object] = {
        "method": "GET",
        "path": "/x",
        "scheme": "http",
        "http_version": "1.1",
        "traceparent": None,
        "tracestate": None,
        "arrived_ns": 0,
        "arrived_at": 0.0,
        "request_id": "req-1",
        "route": "/x",
    }
    return RequestTrace(**(known | more))  # type: ignore[arg-type]
