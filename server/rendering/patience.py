"""How long a template may take: less after every time that it cost a worker."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

_MAX_REMEMBERED: Final = 1024
_MAX_STRIKES: Final = 8
_FACTOR: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class _Strikes:
    number: int
    last_at: float
    told_at: float


class Patience:
    """Processor time that a template gets for one dialogue.

    Dialogues that a template is quick with are answered all the same while others have it run
    for ever; those cost a small part of what they would.

    Args:
        limit_s: Of a template that behaves.
        least_s: However often it did not.
        forgive_s: After so long one strike is forgotten, and the next is told again.
        clock: Monotonic seconds.
    """

    def __init__(
        self, limit_s: float, *, least_s: float, forgive_s: float, clock: Callable[[], float]
    ) -> None:
        self._limit_s = limit_s
        self._least_s = least_s
        self._forgive_s = forgive_s
        self._clock = clock
        self._strikes: OrderedDict[str, _Strikes] = OrderedDict()

    def limit_s(self, digest: str) -> float:
        """Returns how long a template may take now."""
        strikes = self._now(digest)
        return max(self._least_s, self._limit_s / float(_FACTOR**strikes))

    def is_struck(self, digest: str) -> bool:
        """Says whether a template has strikes that are not forgotten."""
        return self._now(digest) > 0

    def strike(self, digest: str) -> bool:
        """Notes that a template came to no end, or took all of the memory.

        Returns:
            Whether that is worth telling: not if it was told of this template a moment ago.
        """
        number, now = min(self._now(digest) + 1, _MAX_STRIKES), self._clock()
        before = self._strikes.get(digest)
        tells = before is None or now - before.told_at >= self._forgive_s
        told_at = now if before is None or tells else before.told_at
        self._strikes[digest] = _Strikes(number=number, last_at=now, told_at=told_at)
        self._strikes.move_to_end(digest)
        if len(self._strikes) > _MAX_REMEMBERED:
            self._strikes.popitem(last=False)
        return tells

    def _now(self, digest: str) -> int:
        strikes = self._strikes.get(digest)
        if strikes is None:
            return 0
        forgiven = int((self._clock() - strikes.last_at) / self._forgive_s)
        if forgiven >= strikes.number:
            del self._strikes[digest]
            return 0
        return strikes.number - forgiven
