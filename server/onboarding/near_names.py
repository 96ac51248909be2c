"""Which known model a name that nobody has was meant to be. Knows no rows."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

_ENOUGH = 0.7  # a letter too many, too few or swapped in a name of four
_MAX_COMPARED_CHARS = 96  # no name is longer


def meant(name: str, known: Iterable[str]) -> str:
    """Returns ` Is 'acme/chat' meant?`, or nothing if no known name is near.

    Args:
        name: A stranger's.
        known: Those that it may have been.
    """
    near = max(known, key=lambda other: _nearness(name, other), default=None)
    if near is None or _nearness(name, near) < _ENOUGH:
        return ""
    return f" Is {near!r} meant?"


def _nearness(name: str, other: str) -> float:
    """Returns how near two names are, from 0 to 1: as near as their parts that differ most.

    An organisation that all models have in common makes no two of them alike.
    """
    parts = name[:_MAX_COMPARED_CHARS].split("/")
    others = other.split("/")
    if len(parts) == len(others):
        return min(_ratio(*pair) for pair in zip(parts, others, strict=True))
    return 1.0 if parts[-1] == others[-1] else _ratio(name[:_MAX_COMPARED_CHARS], other)


def _ratio(one: str, other: str) -> float:
    return SequenceMatcher(None, one, other, autojunk=False).ratio()
