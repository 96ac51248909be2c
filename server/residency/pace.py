"""How long models take to come back, as far as the last ones tell."""

from __future__ import annotations

from collections.abc import Iterable

from server.registry.records import Json

_MIN_BYTES = 1 << 20  # of less, the time says nothing of the rate


class Pace:
    """The bytes that are to move, and how fast the last ones did."""

    def __init__(self) -> None:
        self._nbytes: dict[str, int] = {}
        self._bytes_per_second: float | None = None

    def plan(self, name: str, plan: Json | None) -> None:
        """Notes what is to be moved of a model."""
        self._nbytes[name] = 0 if plan is None else int(plan["unique_bytes"])

    def forget(self, name: str) -> None:
        """Notes that a model does not come."""
        self._nbytes.pop(name, None)

    def note(self, name: str, seconds: float) -> None:
        """Notes that a model has come, and how long its bytes have taken."""
        nbytes = self._nbytes.pop(name, 0)
        if nbytes >= _MIN_BYTES and seconds > 0:
            self._bytes_per_second = nbytes / seconds

    def expected_s(self, names: Iterable[str]) -> float | None:
        """Returns how long it takes until models are all there; None if nobody knows."""
        if self._bytes_per_second is None:
            return None
        return sum(self._nbytes.get(name, 0) for name in names) / self._bytes_per_second
