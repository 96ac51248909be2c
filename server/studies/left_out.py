"""Variants that studies leave out because of their checkpoints. Knows no worker and no registry."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from linker_core.errors import LinkerError
from server.studies.families import Member
from server.studies.files import Stamp

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unfit:
    error: LinkerError
    tried: Stamp  # of the files that could not be studied
    seen: Stamp  # of those that were there last
    seen_at: float  # first, on the clock


class LeftOut:
    """Variants whose checkpoints could not be studied, until these have changed. Event loop only.

    Args:
        settle_s: How long files must have stayed as they are: a copy takes its time.
        clock: Monotonic seconds.
    """

    def __init__(self, *, settle_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._settle_s = settle_s
        self._clock = clock
        self._unfit: dict[Member, _Unfit] = {}

    @property
    def errors(self) -> Mapping[Member, LinkerError]:
        """Why each of them is left out."""
        return {member: unfit.error for member, unfit in self._unfit.items()}

    def add(self, member: Member, error: LinkerError, tried: Stamp) -> None:
        """Leaves a variant out.

        Args:
            member: Which.
            error: Why.
            tried: Of its files before they were tried, so that no change is missed.
        """
        logger.warning("studies leave %s out: %s", member.name, error.message)
        self._unfit[member] = _Unfit(error=error, tried=tried, seen=tried, seen_at=self._clock())

    def keep(self, members: Collection[Member]) -> None:
        """Forgets all others: models that are gone, or have other weights."""
        self._unfit = {member: unfit for member, unfit in self._unfit.items() if member in members}

    def see(self, member: Member, stamp: Stamp) -> None:
        """Notes how the files of a variant are; once others have settled, they are to be tried."""
        unfit = self._unfit[member]
        if stamp != unfit.seen:
            unfit = replace(unfit, seen=stamp, seen_at=self._clock())
            self._unfit[member] = unfit
        if stamp != unfit.tried and self._clock() - unfit.seen_at >= self._settle_s:
            logger.info("the files of %s have changed; studies take it in again", member.name)
            del self._unfit[member]
