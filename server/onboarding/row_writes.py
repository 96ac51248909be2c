"""Writes rows through threads; what is shown follows once they are stored. Event loop only."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from linker_core.errors import NotReadyError
from server.onboarding.shown import Shown
from server.onboarding.unbroken import unbroken
from server.registry.records import JobRecord, ModelRecord, Record
from server.registry.store import Registry

logger = logging.getLogger(__name__)

# The operator's alone to change.
_OPTIONS = ("alias", "pinned", "keep_alive_s", "scores")

_Row = TypeVar("_Row", ModelRecord, JobRecord)


class RowWrites:
    """The one way in which rows of models and jobs change.

    Args:
        registry: Where they rest.
        shown: Shows them.
    """

    def __init__(self, registry: Registry, shown: Shown) -> None:
        self._registry = registry
        self._shown = shown
        # What `settle` could not store; None: a model that was to be deleted.
        self._unwritten: dict[tuple[type, str], ModelRecord | JobRecord | None] = {}
        self._writing = asyncio.Lock()  # keeps the rows in the order of the calls

    async def replace(self, *, delete: Sequence[str] = (), save: Sequence[Record] = ()) -> None:
        """Stores records and deletes models in one transaction, then shows that.

        A cancelled wait ends when that is done.

        Raises:
            ConflictError: One of the models to be deleted would still be the donor of another.
            NotReadyError: The registry cannot be written; nothing has changed.
        """
        await unbroken(self._replace(delete, save))

    async def settle(self, *records: ModelRecord | JobRecord, delete: Sequence[str] = ()) -> None:
        """Shows how something ended; stores it now, or later if the registry cannot be written."""
        await unbroken(self._settle(records, delete))

    def amend(self, record: ModelRecord) -> None:
        """Shows a model's changed row at once; it is stored by the next `write_later`."""
        self._shown.show(record)
        self._unwritten[_key(record)] = record

    async def change(
        self, current: Callable[[], _Row | None], change: Callable[[_Row], _Row]
    ) -> bool:
        """Stores a row changed, then shows it so, whatever else has come to be in it meanwhile.

        Returns:
            Whether there was such a row.

        Raises:
            NotReadyError: The registry cannot be written; nothing has changed.
        """
        return await unbroken(self._change(current, change))

    async def note_use(self, used_at: Mapping[str, float]) -> None:
        """Stores when models were last used.

        Raises:
            NotReadyError: The registry cannot be written.
        """
        async with self._writing:
            known = {name: at for name, at in used_at.items() if name in self._shown.models}
            for name, at in known.items():
                self._shown.models[name] = replace(self._shown.models[name], last_used_at=at)
            if known:
                await asyncio.to_thread(self._registry.touch, known)

    async def write_later(self) -> None:
        """Stores what `settle` could not.

        Raises:
            NotReadyError: The registry still cannot be written.
        """
        async with self._writing:
            waiting = dict(self._unwritten)
            if not waiting:
                return
            records = [self._merged(record) for record in waiting.values() if record is not None]
            deleted = [name for (_, name), record in waiting.items() if record is None]
            await asyncio.to_thread(self._registry.replace, delete=deleted, save=records)
            self._unwritten = {
                key: record
                for key, record in self._unwritten.items()
                if key not in waiting or record is not waiting[key]
            }
        self._shown.drop_finished(records)

    async def _replace(self, delete: Sequence[str], save: Sequence[Record]) -> None:
        async with self._writing:
            save = [self._merged(record) for record in save]
            await asyncio.to_thread(self._registry.replace, delete=delete, save=save)
            records = [record for record in save if isinstance(record, ModelRecord | JobRecord)]
            keys = [_key(record) for record in records] + [(ModelRecord, name) for name in delete]
            for key in keys:
                self._unwritten.pop(key, None)
            self._shown.show(*records)
            self._shown.drop(delete)
            self._shown.drop_finished(records)

    def _merged(self, record: Record) -> Record:
        """Returns a record with what others may have changed since it was made."""
        if isinstance(record, JobRecord) and record.finished_at is None:
            job = self._shown.jobs.get(record.id)
            return record if job is None else replace(record, error=job.error)
        if isinstance(record, ModelRecord):
            model = self._shown.models.get(record.name)
            if model is not None and model.created_at == record.created_at:
                used_at = model.last_used_at  # stored by `note_use`
                return replace(record, **options_of(model), last_used_at=used_at)
        return record

    async def _settle(
        self, records: Sequence[ModelRecord | JobRecord], delete: Sequence[str]
    ) -> None:
        try:
            await self._replace(delete, records)
        except NotReadyError as error:
            logger.warning("the end of a job or a model is not stored yet: %s", error.message)
            self._shown.show(*records)
            self._shown.drop(delete)
            self._unwritten |= {_key(record): record for record in records}
            self._unwritten |= {(ModelRecord, name): None for name in delete}

    async def _change(
        self, current: Callable[[], _Row | None], change: Callable[[_Row], _Row]
    ) -> bool:
        async with self._writing:
            if (row := current()) is None:
                return False
            await asyncio.to_thread(self._registry.save, change(row))
            now = current()
            assert now is not None
            self._shown.show(change(now))
            return True


def options_of(record: ModelRecord) -> dict[str, Any]:
    """Returns what the operator wants of a model; nobody else changes that."""
    return {option: getattr(record, option) for option in _OPTIONS}


def _key(record: ModelRecord | JobRecord) -> tuple[type, str]:
    return type(record), record.name if isinstance(record, ModelRecord) else record.id
