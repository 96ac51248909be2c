"""The studies that are stored, and which of them still say something of a family."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping

from linker_core.errors import NotReadyError
from server.onboarding.roster import Roster
from server.registry.records import StudyRecord
from server.registry.store import Registry
from server.studies.families import Family


class StudyRows:
    """The rows of all studies, the newest last. Event loop only.

    Args:
        registry: Where they rest.
        roster: The known models.

    Attributes:
        is_read: Whether those there were at the start are among them.
    """

    def __init__(self, registry: Registry, roster: Roster) -> None:
        self.is_read = False
        self._registry = registry
        self._roster = roster
        self._rows: dict[str, StudyRecord] = {}  # by key

    async def read(self) -> None:
        """Reads what earlier servers have stored.

        Raises:
            NotReadyError: The registry cannot be read.
        """
        studies = await asyncio.to_thread(self._registry.studies)
        self._rows = {study.key: study for study in studies}
        self.is_read = True

    def find(self, key: str) -> StudyRecord | None:
        """Returns a study, begun or finished."""
        return self._rows.get(key)

    def note(self, study: StudyRecord) -> None:
        """Takes a row that has been stored; it is the newest, whenever it was begun."""
        self._rows.pop(study.key, None)
        self._rows[study.key] = study

    def finished(self, families: Mapping[str, Family]) -> dict[str, StudyRecord]:
        """Returns the newest finished study of each family whose models still have its weights."""
        found: dict[str, StudyRecord] = {}
        for study in self._rows.values():
            family = families.get(study.family)
            if study.summary and family is not None and family.matches(study):
                found[study.family] = study
        return found

    def is_finished(self, family: Family) -> bool:
        """Whether there is a study of just these weights, and it is not damaged."""
        row = None if family.key is None else self._rows.get(family.key)
        return row is not None and bool(row.summary) and family.matches(row)

    async def forget_stale(self, families: Mapping[str, Family], *, but: str | None) -> None:
        """Removes the studies that are of no use any more.

        Args:
            families: As they are now.
            but: The key of one that is under way.
        """
        stale = {
            study.key
            for study in self._rows.values()
            if study.key != but and self._is_stale(study, families)
        }
        if stale:
            with contextlib.suppress(NotReadyError):  # it has been logged, and is tried again
                await asyncio.to_thread(self._registry.delete_studies, stale)
                self._rows = {k: study for k, study in self._rows.items() if k not in stale}

    def _is_stale(self, study: StudyRecord, families: Mapping[str, Family]) -> bool:
        if not self._models_remain(study):
            return True
        key = getattr(families.get(study.family), "key", None)
        if key in (None, study.key):
            return False  # its models may be on their way back
        newer = self._rows.get(key)
        if newer is not None and newer.summary is not None:
            return True
        # A start has forgotten who was left out: the last one begun may be what remains again.
        return study.summary is None and study is not self._last_begun(study.family, but=key)

    def _last_begun(self, family: str, *, but: str) -> StudyRecord | None:
        """Returns the study of a family that was last at work on, and has not ended."""
        begun = (
            study
            for study in reversed(self._rows.values())
            if study.family == family and study.key != but and study.summary is None
        )
        return next(begun, None)

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
