"""How much onboarding may wait and run at a time. Event loop only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from linker_core.errors import QueueFullError
from server.onboarding.jobs import JobRunner


class QueueLimit:
    """Counts jobs and dry runs together.

    Args:
        jobs: Knows how many jobs wait or run.
        limit: Jobs and dry runs, waiting or running.

    Attributes:
        num_rehearsing: Dry runs, waiting or running.
    """

    def __init__(self, *, jobs: JobRunner, limit: int) -> None:
        self._jobs = jobs
        self._limit = limit
        self.num_rehearsing = 0

    def check(self) -> None:
        """Refuses one more.

        Raises:
            QueueFullError: Too many wait.
        """
        if self._jobs.num_live + self.num_rehearsing >= self._limit:
            raise QueueFullError("Too many models are being onboarded; try again later.")

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """Counts a dry run.

        Raises:
            QueueFullError: Too many wait.
        """
        self.check()
        self.num_rehearsing += 1
        try:
            yield
        finally:
            self.num_rehearsing -= 1
            self._jobs.catch_up_soon()  # its tuner may have been in the way of a model
