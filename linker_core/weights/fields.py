"""Typed, bounded reads of an untrusted JSON object.

Every refusal names file, key, value and range.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from linker_core.errors import BadCheckpointError


class Fields:
    """One JSON object of a checkpoint and the name of the file it came from."""

    def __init__(self, record: Mapping[str, Any], source: str) -> None:
        self.record = record
        self.source = source

    def integer(self, key: str, *, low: int, high: int, default: int | None = None) -> int:
        """Returns an integer within [low, high]; absent or null means `default`.

        Raises:
            BadCheckpointError: Missing without a default, not an integer, or out of range.
        """
        value = self.record.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.refuse(key, value, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, *, low: float, high: float, default: float | None = None) -> float:
        """Returns a number within [low, high] as a float; absent or null means `default`.

        Raises:
            BadCheckpointError: Missing without a default, not a number, or out of range.
        """
        value = self.record.get(key)
        if value is None:
            value = default
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not low <= value <= high
        ):
            raise self.refuse(key, value, f"a number from {low} to {high}")
        return float(value)

    def optional_number(self, key: str, *, low: float, high: float) -> float | None:
        """Returns `number`, or None where the key is absent or null."""
        if self.record.get(key) is None:
            return None
        return self.number(key, low=low, high=high)

    def boolean(self, key: str, *, default: bool) -> bool:
        """Returns true or false; absent or null means `default`.

        Raises:
            BadCheckpointError: Anything else.
        """
        value = self.record.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(key, value, "true or false")
        return value

    def choice(self, key: str, options: tuple[str, ...], *, default: str | None = None) -> str:
        """Returns one of `options`; absent or null means `default`.

        Raises:
            BadCheckpointError: Missing without a default, or another value.
        """
        value = self.record.get(key)
        if value is None:
            value = default
        if not isinstance(value, str) or value not in options:
            raise self.refuse(key, value, "one of " + ", ".join(options))
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Returns a token id or a list of them as a tuple; absent, null and -1 mean none.

        Raises:
            BadCheckpointError: Not made of integers from 0 to 2**22, or more than 64 of them.
        """
        value = self.record.get(key)
        ids = value if isinstance(value, list) else [] if value in (None, -1) else [value]
        if len(ids) > 64 or not all(type(i) is int and 0 <= i < 1 << 22 for i in ids):
            raise self.refuse(key, value, "a token id or a list of at most 64")
        return tuple(ids)

    def refuse(self, key: str, value: object, expected: str) -> BadCheckpointError:
        """Returns the error for a value that is not `expected`, the value bounded."""
        shown = "missing" if value is None else f"{value!r:.60}"
        return BadCheckpointError(
            f"{self.source}: {key} is {shown}, expected {expected}. Mend the file."
        )
