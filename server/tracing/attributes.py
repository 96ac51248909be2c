"""A request in the words of OpenTelemetry's semantic conventions: HTTP's, and those of GenAI.

GenAI's are in development; the names are those of the conventions of mid-2026. Left out on purpose
are texts of any kind (messages, stop sequences, queries), addresses and user agents.
"""

from __future__ import annotations

from collections.abc import Mapping

from server.tracing.request import AnswerTrace, OptionValue, RequestTrace

Value = str | int | float | bool | list[str]

PROVIDER = "linker"
_OPTIONS = {
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "max_tokens": "gen_ai.request.max_tokens",
    "n": "gen_ai.request.choice.count",
    "output_type": "gen_ai.output.type",
    "presence_penalty": "gen_ai.request.presence_penalty",
    "seed": "gen_ai.request.seed",
    "stream": "gen_ai.request.stream",
    "temperature": "gen_ai.request.temperature",
    "top_k": "gen_ai.request.top_k",
    "top_p": "gen_ai.request.top_p",
    "variant_mode": "linker.variant_mode",
}
_USAGE = {
    "input_tokens": "gen_ai.usage.input_tokens",
    "output_tokens": "gen_ai.usage.output_tokens",
    "cached_tokens": "gen_ai.usage.cache_read.input_tokens",
}
_METHODS = frozenset(
    {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"}
)
_CUT_OFF = "abort"  # what nobody waited for any more


def span_name(trace: RequestTrace) -> str:
    """Returns the name of a request's span; of few that there are, whatever clients send."""
    if trace.answer is not None:
        return f"{trace.answer.operation} {trace.answer.model}"
    method = _method(trace)
    method = "HTTP" if method == "_OTHER" else method
    return method if trace.route is None else f"{method} {trace.route}"


def request_attributes(trace: RequestTrace) -> Mapping[str, Value]:
    """Returns what is said of any request."""
    said: dict[str, Value] = {
        "http.request.method": _method(trace),
        "url.path": trace.path,
        "url.scheme": trace.scheme,
        "network.protocol.version": trace.http_version,
    }
    optional = {
        "http.route": trace.route,
        "http.response.status_code": trace.status,
        "linker.request_id": trace.request_id,
        "error.type": error_of(trace),
    }
    return said | {name: value for name, value in optional.items() if value is not None}


def answer_attributes(answer: AnswerTrace, *, arrived_at: float) -> Mapping[str, Value]:
    """Returns what is said of a request that a model answers.

    Args:
        answer: What it became.
        arrived_at: When the request came, in monotonic seconds.
    """
    said: dict[str, Value] = {
        "gen_ai.operation.name": answer.operation,
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": answer.asked_model,
        "gen_ai.response.id": answer.response_id,
        "gen_ai.response.model": answer.model,
        **_options(answer.options),
        **{_USAGE[name]: count for name, count in answer.usage.items()},
    }
    if answer.options.get("stream") and answer.first_token_at is not None:
        said["gen_ai.response.time_to_first_chunk"] = answer.first_token_at - arrived_at
    if answer.submitted_at is not None:
        otherwise = _CUT_OFF if answer.error is None else "error"
        reasons = (answer.finish_reasons.get(k, otherwise) for k in range(answer.num_choices))
        said["gen_ai.response.finish_reasons"] = list(reasons)
    return said


def error_of(trace: RequestTrace) -> str | None:
    """Returns how a request failed: an error's code, else its status; None if it did not."""
    if trace.answer is not None and trace.answer.error is not None:
        return trace.answer.error
    if trace.error is not None:
        return trace.error
    return str(trace.status) if trace.status is not None and trace.status >= 400 else None


def is_our_fault(trace: RequestTrace) -> bool:
    """Whether a span's status is an error: what clients do wrong is none of the server's."""
    failed_on_the_way = trace.answer is not None and trace.answer.error is not None
    if trace.status is None or trace.status < 400:
        return failed_on_the_way
    return trace.status >= 500


def _options(options: Mapping[str, OptionValue]) -> Mapping[str, OptionValue]:
    return {_OPTIONS[name]: value for name, value in options.items()}


def _method(trace: RequestTrace) -> str:
    return trace.method if trace.method in _METHODS else "_OTHER"
