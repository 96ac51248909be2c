"""Who writes the spans: nobody, unless the settings name a collector."""

from __future__ import annotations

from typing import Protocol

from linker_core.errors import InvalidRequestError
from server.settings import TelemetrySettings
from server.tracing.request import RequestTrace


class SpanWriter(Protocol):
    """Takes requests that are over."""

    def write(self, trace: RequestTrace) -> None:
        """Writes one; never waits."""

    async def close(self, *, within_s: float) -> None:
        """Sends what is still to be sent, for so long at most."""


def open_writer(settings: TelemetrySettings) -> SpanWriter | None:
    """Returns who writes the spans; without a collector nobody, and nothing is imported.

    Raises:
        InvalidRequestError: The extra that writes them is not installed.
    """
    if settings.otlp_endpoint is None:
        return None
    try:
        from server.tracing.spans import OtlpSpans  # noqa: PLC0415 - an extra, and slow to import
    except ImportError as error:
        raise InvalidRequestError(
            f"telemetry.otlp_endpoint is set, and OpenTelemetry is not installed ({error}). "
            "Run pip install '.[otel]' in a clone of this project, or leave the setting out.",
            param="telemetry.otlp_endpoint",
        ) from error
    return OtlpSpans(settings)
