"""The errors a caller treats differently, each with the code that clients see.

Every message says what is wrong, where, why, and what to do about it. It never holds a traceback.
"""

from __future__ import annotations

from typing import ClassVar


class LinkerError(Exception):
    """Base of every error that is the user's to mend.

    Args:
        message: What, where, why and the remedy, in one or two sentences.
        param: Dotted path of the offending request field, if one is to blame.
        retry_after_s: When it is worth trying again, if what is in the way passes by itself. It
            crosses no process boundary.
    """

    code: ClassVar[str] = "linker_error"

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        return (from_record, (self.to_record(),))

    def to_record(self) -> dict[str, str | None]:
        """Returns the error as a plain record, to cross a process boundary or rest in a row."""
        return {"code": self.code, "message": self.message, "param": self.param}


class BadCheckpointError(LinkerError):
    """A checkpoint that lies, is damaged, or does not fit its donor."""

    code = "bad_checkpoint"


class UnusableModelError(LinkerError):
    """A model that was loaded and cannot give its first token."""

    code = "unusable_model"


class UnsupportedFormatError(LinkerError):
    """Weights in another format than safetensors, or an architecture outside the allow-list."""

    code = "unsupported_format"


class ForbiddenSourceError(LinkerError):
    """A source outside the configured roots. The message never repeats the path."""

    code = "forbidden_source"


class InvalidRequestError(LinkerError):
    """A parameter that is out of bounds, contradictory or cannot be honoured."""

    code = "invalid_request_error"


class ContextLengthError(LinkerError):
    """Prompt and answer do not fit the model's context."""

    code = "context_length_exceeded"


class ModelNotFoundError(LinkerError):
    """No model of that name."""

    code = "model_not_found"


class JobNotFoundError(LinkerError):
    """No job of that id."""

    code = "job_not_found"


class ConflictError(LinkerError):
    """The name is taken by other content, or the model is in use by others."""

    code = "conflict"


class NotReadyError(LinkerError):
    """Known but not servable now: loading, draining, or the engine is down."""

    code = "not_ready"


class InvalidKeyError(LinkerError):
    """No API key, or none that is known."""

    code = "invalid_api_key"


class PermissionDeniedError(LinkerError):
    """A key, or an address, that this is not open to."""

    code = "permission_denied"


class RateLimitError(LinkerError):
    """A key has used up what it may for now."""

    code = "rate_limit_exceeded"


class QueueFullError(LinkerError):
    """More work is waiting than the server accepts."""

    code = "queue_full"


class InsufficientCapacityError(LinkerError):
    """Does not fit into the memory budget."""

    code = "insufficient_capacity"


class BudgetExceededError(LinkerError):
    """A plan costs the variant more than the budget it was held against."""

    code = "budget_exceeded"


class JobCancelledError(LinkerError):
    """A job was cancelled before it was done."""

    code = "job_cancelled"


class DeadlineError(LinkerError):
    """An answer took longer than it may."""

    code = "deadline_exceeded"


class EngineFailureError(LinkerError):
    """The engine could not finish a request through no fault of the client."""

    code = "engine_failure"


class NumericalError(EngineFailureError):
    """A request's logits were not finite."""

    code = "numerical_error"


_BY_CODE: dict[str, type[LinkerError]] = {
    kind.code: kind
    for kind in (
        BadCheckpointError,
        UnusableModelError,
        UnsupportedFormatError,
        ForbiddenSourceError,
        InvalidRequestError,
        ContextLengthError,
        ModelNotFoundError,
        JobNotFoundError,
        ConflictError,
        NotReadyError,
        InvalidKeyError,
        PermissionDeniedError,
        RateLimitError,
        QueueFullError,
        InsufficientCapacityError,
        BudgetExceededError,
        JobCancelledError,
        DeadlineError,
        EngineFailureError,
        NumericalError,
    )
}


def from_record(record: dict[str, str | None]) -> LinkerError:
    """Rebuilds an error from `LinkerError.to_record`."""
    code, message = record["code"], record["message"]
    assert code is not None
    assert message is not None
    return _BY_CODE.get(code, LinkerError)(message, param=record.get("param"))
