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
from collections.abc import Callable, Mapping
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
from server.studies.files import Locator
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
        self._rows: dict[str, StudyRecord] = {}  # by key
        self._is_read = False  # whether those there were at the start are among them
        self._since: dict[str, float] = {}  # when a family was first seen as it is, by key
        self._failures = Failures(
            backoff_s=self._timing.backoff_s,
            max_backoff_s=self._timing.max_backoff_s,
            clock=clock,
        )
        self._last_job_at = clock()
        self._attempt: Attempt | None = None
        self._spent = Spent()  # by workers that have ended

    # --- what is known ------------------------------------------------------------------------

    def families(self) -> dict[str, Family]:
        """Returns the families of the known models by label."""
        return families_of(self._roster.models())

    def finished(self) -> dict[str, StudyRecord]:
        """Returns the newest finished study of each family whose models still have its weights."""
        families = self.families()
        found: dict[str, StudyRecord] = {}
        for study in self._rows.values():  # the oldest first
            family = families.get(study.family)
            if study.summary and family is not None and family.matches(study):
                found[study.family] = study
        return found

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
        if not self._is_read:
            return "It is not read yet what is stored of it."
        if self._roster.live_jobs():
            return f"It begins once no job has run for {self._timing.settle_s:g} s."
        if self._attempt is not None:
            return f"It begins once the study of {self._attempt.family.label} has ended."
        calm_in_s = math.ceil(self._calm_in_s(family.key))
        if calm_in_s > 0:
            return f"It begins in {calm_in_s} s, if no job runs and its models stay as they are."
        return "It is about to begin."

    async def tensors(self, key: str) -> Mapping[str, Json]:
        """Returns what a study has found, tensor by tensor, as far as it is stored.

        Raises:
            NotReadyError: The registry cannot be read.
        """
        return await asyncio.to_thread(self._registry.study_tensors, key)

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
                studies = await asyncio.to_thread(self._registry.studies)
                self._rows = {study.key: study for study in studies}
                self._is_read = True
                return
            await self._pause()

    async def _look(self) -> None:
        """Notes what has changed, and forgets studies that are of no use any more."""
        now, families = self._clock(), self.families()
        keys = {family.key for family in families.values() if family.key is not None}
        self._since = {key: self._since.get(key, now) for key in keys}
        self._failures.keep(keys)
        if self._roster.live_jobs():
            self._last_job_at = now
        stale = {study.key for study in self._rows.values() if self._is_stale(study, families)}
        if stale:
            with contextlib.suppress(NotReadyError):  # it has been logged, and is tried again
                await asyncio.to_thread(self._registry.delete_studies, stale)
                self._rows = {k: study for k, study in self._rows.items() if k not in stale}

    def _is_stale(self, study: StudyRecord, families: Mapping[str, Family]) -> bool:
        if self._attempt is not None and self._attempt.study.key == study.key:
            return False
        if not self._models_remain(study):
            return True
        key = getattr(families.get(study.family), "key", None)
        if key in (None, study.key):
            return False  # its models may be on their way back
        newer = self._rows.get(key)
        return study.summary is None or (newer is not None and newer.summary is not None)

    def _models_remain(self, study: StudyRecord) -> bool:
        """Whether all models of a study are known, and of none it is known that it has changed."""
        if self._roster.find(study.family) is None:
            return False
        models = {name: self._roster.find(name) for name in study.variants}
        return all(
            model is not None
            and (model.family or model.name) == study.family
            and model.fingerprint in (None, study.variants[name])
            for name, model in models.items()
        )

    def _due(self) -> Family | None:
        """Returns a family whose study is to be begun or gone on with now, or None."""
        if not self.is_enabled or self._roster.live_jobs():
            return None
        for family in self.families().values():
            if family.key is not None and self._is_due(family, family.key):
                return family
        return None

    def _is_due(self, family: Family, key: str) -> bool:
        row = self._rows.get(key)
        if row is not None and row.summary and family.matches(row):  # else it is damaged
            return False
        return self._failures.retry_in_s(key) == 0 and self._calm_in_s(key) <= 0

    def _calm_in_s(self, key: str) -> float:
        """Returns for how long a family's models and jobs must still be left alone."""
        now = self._clock()
        return self._timing.settle_s - (now - max(self._since.get(key, now), self._last_job_at))

    async def _study(self, family: Family) -> None:
        """Runs a worker until it has ended, or has to give way; it goes on another time."""
        assert family.key is not None
        begun = self._rows.get(family.key)
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
            self._rows[family.key] = attempt.study
        if work.cancelled():
            logger.info("the study of %s gives way; it goes on another time", family.label)
        elif (error := work.exception()) is None:
            await self._finish(attempt, work.result())
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
        # The newest last, whenever it was begun.
        self._rows = {k: row for k, row in self._rows.items() if k != study.key}
        self._rows[study.key] = study
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
