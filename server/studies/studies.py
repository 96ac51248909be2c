"""Keeps a study of every family up to date, one worker at a time, while nothing heavier runs.

A study is of the checkpoints that a family has: another set of them is another study. Rows of
tensors outlive workers and servers, so whatever ends a worker costs at most what it had in hand.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

from linker_core.errors import LinkerError, NotReadyError
from linker_core.pace import Spent
from server.onboarding.roster import Roster
from server.registry.records import Json, StudyRecord
from server.registry.store import Registry
from server.studies.attempt import Attempt
from server.studies.failures import Failure, Failures, as_told
from server.studies.families import Family, families_of
from server.studies.files import Locator, UnfitError
from server.studies.left_out import LeftOut
from server.studies.rows import StudyRows
from server.studies.tensor_records import read_records
from server.studies.worker import StudyWorker

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """When studies begin. Seconds."""

    settle_s: float = 30.0  # how long a family's models, and jobs, must have been left alone
    look_s: float = 1.0  # between two looks at what there is to do
    backoff_s: float = 60.0  # after a first failure, twice as long after each more
    max_backoff_s: float = 3600.0


class Studies:
    """The studies of all families. Event loop only.

    Args:
        roster: The known models and jobs.
        registry: Where studies rest.
        files: Finds checkpoints.
        worker: Starts workers.
        closing: Set when no more work is taken.
        is_enabled: Whether workers are started at all; what is known is shown all the same.
        timing: When.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        *,
        roster: Roster,
        registry: Registry,
        files: Locator,
        worker: StudyWorker,
        closing: asyncio.Event,
        is_enabled: bool = True,
        timing: Timing | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.is_enabled = is_enabled
        self._roster = roster
        self._registry = registry
        self._files = files
        self._worker = worker
        self._closing = closing
        self._timing = timing or Timing()
        self._clock = clock
        self._rows = StudyRows(registry, roster)
        self._since: dict[str, float] = {}  # when a family was first seen as it is, by key
        self._failures = Failures(
            backoff_s=self._timing.backoff_s,
            max_backoff_s=self._timing.max_backoff_s,
            clock=clock,
        )
        self._left_out = LeftOut(settle_s=self._timing.settle_s, clock=clock)
        self._last_job_at = clock()
        self._attempt: Attempt | None = None
        self._spent = Spent()  # by workers that have ended

    # --- what is known ------------------------------------------------------------------------

    def families(self) -> dict[str, Family]:
        """Returns the families of the known models by label."""
        return families_of(self._roster.models(), self._left_out.errors)

    def finished(self) -> dict[str, StudyRecord]:
        """Returns the newest finished study of each family whose models still have its weights."""
        return self._rows.finished(self.families())

    def attempt(self, family: Family) -> Attempt | None:
        """Returns the attempt that runs now at the study of a family as it is, or None."""
        attempt = self._attempt
        return attempt if attempt is not None and attempt.study.key == family.key else None

    def failure(self, family: Family) -> Failure | None:
        """Returns how the last attempt at the study of a family as it is has failed, or None."""
        return None if family.key is None else self._failures.find(family.key)

    def retry_in_s(self, family: Family) -> float:
        """Returns when a study is tried again, if its models do not change before."""
        assert family.key is not None
        return self._failures.retry_in_s(family.key)

    def waits_for(self, family: Family) -> str:
        """Returns what must be before a study that can be made begins, in words."""
        assert family.key is not None
        if not self._rows.is_read:
            return "It is not read yet what is stored of it."
        if self._roster.live_jobs():
            return f"It begins once no job has run for {self._timing.settle_s:g} s."
        if self._attempt is not None:
            return f"It begins once the study of {self._attempt.family.label} has ended."
        calm_in_s = math.ceil(self._calm_in_s(family.key))
        if calm_in_s > 0:
            return f"It begins in {calm_in_s} s, if no job runs and its models stay as they are."
        return "It is about to begin."

    async def records(self, key: str | None) -> AsyncIterator[bytes]:
        """Yields what a study has found, tensor by tensor in the order of blocks, as lines of JSON.

        Args:
            key: Which; None: none, which has found nothing.

        Raises:
            NotReadyError: The registry cannot be read.
        """
        few = iter(()) if key is None else read_records(self._registry, key)
        while (records := await asyncio.to_thread(next, few, None)) is not None:
            for record in records.values():
                yield record

    @property
    def spent(self) -> Spent:
        """Seconds that workers have taken since the server's start."""
        now = Spent() if self._attempt is None else self._attempt.spent
        return Spent(*(a + b for a, b in zip(self._spent, now, strict=True)))

    # --- what is done -------------------------------------------------------------------------

    async def run(self) -> None:
        """Studies until cancelled; from the drain on it waits for that alone."""
        await self._open()
        while not self._closing.is_set():
            await self._look()
            family = self._due()
            if family is None:
                await self._pause()
            else:
                await self._study(family)
        await asyncio.Event().wait()

    async def _open(self) -> None:
        while not self._closing.is_set():
            with contextlib.suppress(NotReadyError):  # it has been logged
                await self._rows.read()
                return
            await self._pause()

    async def _look(self) -> None:
        """Notes what has changed, and forgets what is of no use any more."""
        await self._look_at_files()
        now, families = self._clock(), self.families()
        keys = {family.key for family in families.values() if family.key is not None}
        self._since = {key: self._since.get(key, now) for key in keys}
        self._failures.keep(keys)
        if self._roster.live_jobs():
            self._last_job_at = now
        under_way = None if self._attempt is None else self._attempt.study.key
        await self._rows.forget_stale(families, but=under_way)

    async def _look_at_files(self) -> None:
        """Takes variants in again whose files have changed."""
        known = {member for family in self.families().values() for member in family.left_out}
        self._left_out.keep(known)
        if self._attempt is None:  # else one would begin anew, and perhaps for nothing
            for member in known:
                self._left_out.see(member, await self._files.stamp(member))

    def _due(self) -> Family | None:
        """Returns a family whose study is to be begun or gone on with now, or None."""
        if not self.is_enabled or self._roster.live_jobs():
            return None
        for family in self.families().values():
            key = family.key
            if key is None or self._rows.is_finished(family):
                continue
            if self._failures.retry_in_s(key) == 0 and self._calm_in_s(key) <= 0:
                return family
        return None

    def _calm_in_s(self, key: str) -> float:
        """Returns for how long a family's models and jobs must still be left alone."""
        now = self._clock()
        return self._timing.settle_s - (now - max(self._since.get(key, now), self._last_job_at))

    async def _study(self, family: Family) -> None:
        """Runs a worker until it has ended, or has to give way; it goes on another time."""
        assert family.key is not None
        begun = self._rows.find(family.key)
        study = family.new_study(at=time.time() if begun is None else begun.created_at)
        attempt = self._attempt = Attempt(family, study, self._registry)
        work = asyncio.ensure_future(attempt.run(self._files, self._worker))
        try:
            while not work.done() and not self._must_end(family):
                await self._pause(work)
                await self._look()
                with contextlib.suppress(NotReadyError):  # it has been logged
                    await attempt.flush()
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            with contextlib.suppress(NotReadyError):
                await attempt.flush()
            self._spent, self._attempt = self.spent, None
            self._rows.note(attempt.study)
        if work.cancelled():
            logger.info("the study of %s gives way; it goes on another time", family.label)
        elif (error := work.exception()) is None:
            await self._finish(attempt, work.result())
        elif isinstance(error, UnfitError):
            for member in family.variants:
                if (why := error.errors.get(str(member.name))) is not None:
                    self._left_out.add(member, why, attempt.stamps[member])
        else:
            self._note_failure(family, as_told(error))

    def _must_end(self, family: Family) -> bool:
        now = self.families().get(family.label)
        changed = now is None or now.key != family.key
        return changed or self._closing.is_set() or bool(self._roster.live_jobs())

    async def _finish(self, attempt: Attempt, summary: Json) -> None:
        study = replace(attempt.study, summary=summary, finished_at=time.time())
        try:
            await attempt.flush()
            await asyncio.to_thread(self._registry.save, study)
        except NotReadyError as error:
            self._note_failure(attempt.family, error)
            return
        self._rows.note(study)
        self._failures.forget(study.key)
        logger.info("the study of %s is done", study.family)

    def _note_failure(self, family: Family, error: LinkerError) -> None:
        assert family.key is not None
        self._failures.note(family.key, error)
        logger.warning("the study of %s failed: %s", family.label, error.message)

    async def _pause(self, *work: asyncio.Future[Any]) -> None:
        """Waits until it is time to look again, the server closes, or work has ended."""
        closing = asyncio.ensure_future(self._closing.wait())
        try:
            await asyncio.wait(
                {closing, *work},
                timeout=self._timing.look_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            closing.cancel()
