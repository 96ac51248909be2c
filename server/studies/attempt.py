"""One attempt at a study: what it was given, what it has found, what is not stored yet."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace

from linker_core.pace import Spent
from server.registry.records import Json, StudyRecord
from server.registry.store import Registry
from server.studies.families import Family, Member
from server.studies.files import Locator, Stamp
from server.studies.tensor_records import read_records
from server.studies.worker import Listener, Order, StudyWorker


class Attempt:
    """One worker's work on one study. Event loop only.

    Args:
        family: What it is about.
        study: Its row.
        registry: Where rows of tensors go.

    Attributes:
        family: As given.
        study: Its row, with the number of tensors as soon as that is known.
        done: Tensors whose records there are.
        spent: What the worker has taken so far.
        stamps: Of the variants' files before any of them was read.
    """

    def __init__(self, family: Family, study: StudyRecord, registry: Registry) -> None:
        self.family = family
        self.study = study
        self.done: set[str] = set()
        self.spent = Spent()
        self.stamps: Mapping[Member, Stamp] = {}
        self._registry = registry
        self._unsaved: dict[str, Json] = {}
        self._saving: asyncio.Future[None] | None = None  # the last, perhaps in progress

    async def run(self, files: Locator, worker: StudyWorker) -> Json:
        """Returns the summary; goes on where an earlier attempt has ended.

        Raises:
            UnfitError: Some variants are to be left out.
            LinkerError: Why there is none.
        """
        assert self.family.base is not None
        self.stamps = {one: await files.stamp(one) for one in self.family.variants}
        places = await files.find(self.family)
        await self._save(self._registry.save, self.study)
        self.done, lines = await asyncio.to_thread(self._known)
        order = Order(base_name=self.family.base.name, places=places, done=lines)
        listener = Listener(
            on_opened=self._note_opened, on_record=self._note_record, on_spent=self._note_spent
        )
        return await worker.run(order, listener)

    async def flush(self) -> None:
        """Stores the records that have come since the last call.

        Raises:
            NotReadyError: The registry cannot be written; they wait for the next call.
        """
        if self._saving is not None:  # a call that was cancelled left it: both would add the rows
            await asyncio.wait({self._saving})
        records = dict(self._unsaved)
        if records:
            await self._save(self._registry.save_study_tensors, self.study.key, records)
        for name in records:
            del self._unsaved[name]

    async def _save(self, verb: Callable[..., None], *arguments: object) -> None:
        """Changes the registry; goes on behind a call that is cancelled, see `flush`."""
        self._saving = asyncio.ensure_future(asyncio.to_thread(verb, *arguments))
        await asyncio.shield(self._saving)

    def _known(self) -> tuple[set[str], deque[bytes]]:
        """Returns the tensors that are stored, and their records as a worker is told them.

        In a thread of its own: of many fine-tunes they are a hundred megabytes.
        """
        names, lines = set[str](), deque[bytes]()
        for records in read_records(self._registry, self.study.key):
            names |= records.keys()
            lines += records.values()
        return names, lines

    def _note_opened(self, num_tensors: int) -> None:
        self.study = replace(self.study, num_tensors=num_tensors)

    def _note_record(self, name: str, record: Json) -> None:
        self.done.add(name)
        self._unsaved[name] = record

    def _note_spent(self, spent: Spent) -> None:
        self.spent = spent
