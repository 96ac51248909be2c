"""What is known of one request once it is over: filled in while it runs, read when it is written.

Nothing here is a text of a prompt or an answer, and nothing needs the extra that writes spans.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

OptionValue = str | int | float | bool


@dataclass(slots=True, kw_only=True)
class AnswerTrace:
    """One answer of a model, of one choice or several. Times are monotonic seconds."""

    operation: str  # as the conventions call it: chat, text_completion
    asked_model: str
    model: str
    response_id: str
    options: Mapping[str, OptionValue]  # what the request says, by the names of its fields
    num_choices: int = 1
    submitted_at: float | None = None  # to the engine; None: it never came so far
    begun_at: float | None = None  # the first step that computed one of its sequences
    first_token_at: float | None = None
    last_token_at: float | None = None
    finish_reasons: dict[int, str] = field(default_factory=dict)  # by choice, as they ended
    usage: Mapping[str, int] = field(default_factory=dict)  # input, output and cached tokens
    error: str | None = None  # its code


@dataclass(slots=True, kw_only=True)
class RequestTrace:
    """One HTTP request."""

    method: str
    path: str
    scheme: str
    http_version: str
    traceparent: str | None  # what the client says of the trace it is part of, not checked yet
    tracestate: str | None
    arrived_ns: int  # since the epoch
    arrived_at: float  # the same moment in monotonic seconds
    ended_at: float = 0.0
    request_id: str | None = None
    route: str | None = None  # None: no route took it
    status: int | None = None  # None: no answer was begun
    error: str | None = None
    answer: AnswerTrace | None = None

    def since_epoch_ns(self, at: float) -> int:
        """Returns the moment of a monotonic time."""
        return self.arrived_ns + int((at - self.arrived_at) * 1e9)
