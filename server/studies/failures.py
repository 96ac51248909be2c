"""Studies that have failed, and when each is tried again. Knows no worker and no registry."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

from linker_core.errors import (
    BadCheckpointError,
    EngineFailureError,
    InvalidRequestError,
    LinkerError,
    UnsupportedFormatError,
)

logger = logging.getLogger(__name__)

# The files' own fault: it stays until somebody puts them right, of which nobody tells.
FILES_FAULTS: Final = (BadCheckpointError, InvalidRequestError, UnsupportedFormatError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """How the last attempt at a study ended."""

    error: LinkerError
    times: int  # that it has failed
    retry_at: float  # on the clock


class Failures:
    """The failures of studies that may still be made, by the studies' keys. Event loop only.

    Args:
        backoff_s: How long after a first failure; twice as long after each more.
        max_backoff_s: At most; and after a failure through files at once.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        *,
        backoff_s: float,
        max_backoff_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._backoff_s = backoff_s
        self._max_backoff_s = max_backoff_s
        self._clock = clock
        self._by_key: dict[str, Failure] = {}

    def find(self, key: str) -> Failure | None:
        """Returns how the last attempt has failed, or None."""
        return self._by_key.get(key)

    def note(self, key: str, error: LinkerError) -> None:
        """Notes that an attempt has failed."""
        known = self._by_key.get(key)
        times = 1 if known is None else known.times + 1
        wait_s = min(self._backoff_s * 2 ** (times - 1), self._max_backoff_s)
        if isinstance(error, FILES_FAULTS):
            wait_s = self._max_backoff_s
        self._by_key[key] = Failure(error=error, times=times, retry_at=self._clock() + wait_s)

    def forget(self, key: str) -> None:
        """Forgets the failures of a study that has succeeded."""
        self._by_key.pop(key, None)

    def keep(self, keys: Collection[str]) -> None:
        """Forgets the failures of all other studies."""
        self._by_key = {key: failure for key, failure in self._by_key.items() if key in keys}

    def retry_in_s(self, key: str) -> float:
        """Returns when a study may be tried again; 0 of one that may be now."""
        failure = self._by_key.get(key)
        return 0.0 if failure is None else max(0.0, failure.retry_at - self._clock())


def as_told(error: BaseException) -> LinkerError:
    """Returns why an attempt has failed; a fault of ours is logged, and ends no server."""
    if isinstance(error, LinkerError):
        return error
    logger.error("a study could not be made", exc_info=error)
    return EngineFailureError("The study failed through a fault of the server; see its log.")
