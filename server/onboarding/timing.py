"""Where the time of an admission goes, by stage (BS appendix N)."""

from __future__ import annotations

import time
from collections.abc import Callable

STAGES = ("open", "hash", "scan", "tune", "encode", "alias", "move", "ready")


class Stopwatch:
    """Adds up seconds by stage; one stage runs at a time, or none.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stage: str | None = None
        self._since = 0.0
        self._spent: dict[str, float] = {}

    def enter(self, stage: str) -> None:
        """Ends the running stage and begins another, a first or a further time."""
        self.stop()
        assert stage in STAGES
        self._stage, self._since = stage, self._clock()

    def stop(self) -> None:
        """Ends the running stage, if there is one."""
        if self._stage is not None:
            self.add(self._stage, self._clock() - self._since)
        self._stage = None

    def add(self, stage: str, seconds: float) -> None:
        """Adds what was measured elsewhere."""
        assert stage in STAGES
        self._spent[stage] = self._spent.get(stage, 0.0) + seconds

    @property
    def spent(self) -> dict[str, float]:
        """The seconds of the stages that were not skipped."""
        return dict(self._spent)

    def to_json(self) -> dict[str, float]:
        """Returns the seconds of every stage, 0 for one that was skipped."""
        return dict.fromkeys(STAGES, 0.0) | self._spent
