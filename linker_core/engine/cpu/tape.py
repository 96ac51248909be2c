"""A recorded sequence of regions, which is replayed with hardly any Python in between."""

from __future__ import annotations

from collections.abc import Sequence

from linker_core.engine.cpu.regions import Call


class Tape:
    """Calls in their order, and what they need to stay in memory."""

    def __init__(self) -> None:
        self._calls: list[Call] = []
        self._kept: list[object] = []

    def add(self, call: Call, kept: Sequence[object]) -> None:
        """Notes a call down.

        Args:
            call: Already run once.
            kept: What lies behind the addresses in its record.
        """
        self._calls.append(call)
        self._kept.extend(kept)

    def replay(self) -> None:
        """Runs every call again."""
        for call in self._calls:
            call.run()
