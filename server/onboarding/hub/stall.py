"""Notices a hub that stands still, wherever it does: name, connection, headers or body."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from linker_core.errors import NotReadyError
from server.onboarding.hub.limits import LEAST_BYTES_PER_S


class StallWatch:
    """An alarm that goes off where too little arrives. In the main thread of a process alone.

    Args:
        timeout_s: Within so long there have to be `LEAST_BYTES_PER_S` bytes for each second.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._awaited_bytes = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches what is done inside.

        Raises:
            NotReadyError: The hub stands still.
        """
        before = signal.signal(signal.SIGALRM, self._on_alarm)
        self._rewind()
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def on_bytes(self, nbytes: int) -> None:
        """Notes what has arrived."""
        self._awaited_bytes -= nbytes
        if self._awaited_bytes <= 0:
            self._rewind()

    def _rewind(self) -> None:
        self._awaited_bytes = self._timeout_s * LEAST_BYTES_PER_S
        signal.setitimer(signal.ITIMER_REAL, self._timeout_s)

    def _on_alarm(self, _number: int, _frame: FrameType | None) -> None:
        raise NotReadyError(
            f"The hub sent less than {LEAST_BYTES_PER_S} bytes a second for "
            f"{self._timeout_s:g} s. Onboard the model again; what has arrived is kept."
        )
