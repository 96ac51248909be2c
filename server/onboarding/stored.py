"""Reads stored records back. One that cannot be read, by damage or by age, is as good as none."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from server.registry.records import Json

_Value = TypeVar("_Value")


def restored(read: Callable[[Json], _Value], record: Json | None) -> _Value | None:
    """Returns what a record holds, or None if there is none or `read` can make nothing of it."""
    if record is None:
        return None
    try:
        return read(record)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
