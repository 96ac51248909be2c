"""Which models leave when memory is needed. Knows bytes and idle time, and does nothing itself.

A policy is any function that orders candidates; `by_bytes_and_idle_time` is the one in use. It asks
first whoever has held most for longest: a large model that nobody wants any more leaves before a
small one, and before a large one that was asked a moment ago.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A resident model that may leave."""

    model: str
    unique_bytes: int  # what its leaving gives back
    idle_s: float  # since its last request ended


Policy = Callable[[Sequence[Candidate]], list[Candidate]]  # whom to ask first


def by_bytes_and_idle_time(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Returns the candidates by unique bytes x idle time, largest first.

    Of equals the longer idle, then the larger, then the name decides.
    """
    return sorted(
        candidates, key=lambda c: (-c.unique_bytes * c.idle_s, -c.idle_s, -c.unique_bytes, c.model)
    )


def choose(
    candidates: Sequence[Candidate],
    needed_bytes: int,
    free_bytes: int,
    policy: Policy = by_bytes_and_idle_time,
) -> list[Candidate] | None:
    """Returns who has to leave so that `needed_bytes` are free, in the policy's order.

    They are asked in that order until there is enough. Those of whom it turns out that the others
    suffice then stay, the last to be asked first; so nobody leaves in vain.

    Args:
        candidates: All that may leave.
        needed_bytes: To be free.
        free_bytes: Free now.
        policy: Whom to ask first.

    Returns:
        Nobody if there is enough already; None if all of them together would not do.
    """
    missing = needed_bytes - free_bytes
    chosen: list[Candidate] = []
    for candidate in policy(candidates):
        if missing <= 0:
            break
        chosen.append(candidate)
        missing -= candidate.unique_bytes
    if missing > 0:
        return None
    for candidate in reversed(list(chosen)):
        if missing + candidate.unique_bytes <= 0:
            chosen.remove(candidate)
            missing += candidate.unique_bytes
    return chosen
