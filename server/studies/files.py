"""Where the checkpoints of a study lie, once it is sure that they are still the ones rows mean."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

from linker_core.errors import BadCheckpointError, LinkerError, NotReadyError, from_record
from linker_core.weights.checkpoint import Identity
from server.onboarding.adapters import AdapterSide, Source
from server.onboarding.bases import Bases
from server.onboarding.planner import Planner
from server.onboarding.roster import Roster
from server.onboarding.sources import Sources
from server.residency.catalog import Catalog, TextSide
from server.studies.failures import FILES_FAULTS
from server.studies.families import Family, Member

# Name, inode, size, mtime and ctime in ns of what a directory holds; empty where there is none.
Stamp: TypeAlias = tuple[tuple[str, int, int, int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A checkpoint's directory, and its weight files as they were when it was validated."""

    path: Path
    identity: Identity

    def is_unchanged(self) -> bool:
        """Whether those are the files that are there now. Blocking."""
        try:
            now = [(name, os.lstat(self.path / name)) for name, *_ in self.identity]
        except OSError:
            return False
        return self.identity == tuple(
            (name, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in now
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """The checkpoints of one study."""

    base: Place
    variants: Mapping[str, Place]


class UnfitError(Exception):
    """Some variants of a study have checkpoints that cannot be studied; the others may be.

    Args:
        errors: Why, by the variants' names.
    """

    def __init__(self, errors: Mapping[str, LinkerError]) -> None:
        super().__init__(*errors)
        self.errors = errors


class Locator(Protocol):
    """Finds the checkpoints of a study."""

    async def find(self, family: Family) -> Places:
        """Returns where they are.

        Raises:
            UnfitError: Those of some variants cannot be read, or are not what they were.
            LinkerError: That is so of the base, or nothing can be read at the moment.
        """

    async def stamp(self, member: Member) -> Stamp:
        """Returns what changes whenever files of a variant's checkpoint do."""


class Files:
    """The checkpoints of models. Event loop only.

    Args:
        roster: The known models.
        catalog: Knows the files of those that are or were resident.
        sources: Finds the others.
        planner: Knows fingerprints.
        bases: Has the bases of which no model is left.
    """

    def __init__(
        self,
        *,
        roster: Roster,
        catalog: Catalog,
        sources: Sources,
        planner: Planner,
        bases: Bases,
    ) -> None:
        self._roster = roster
        self._catalog = catalog
        self._sources = sources
        self._planner = planner
        self._bases = bases

    async def find(self, family: Family) -> Places:
        """Returns where a family's checkpoints are; what nobody has read yet is hashed.

        Raises:
            UnfitError: Those of some variants cannot be read, or were replaced.
            BadCheckpointError: That is so of the base.
            ModelNotFoundError: A model was deleted meanwhile.
            NotReadyError: The base's download is gone, or the registry cannot be read.
        """
        assert family.base is not None
        base = await self._find(family.base)
        variants: dict[str, Place] = {}
        errors: dict[str, LinkerError] = {}
        for member in family.variants:
            try:
                variants[str(member.name)] = await self._find(member)
            except FILES_FAULTS as error:
                errors[str(member.name)] = error
            except NotReadyError as error:
                if await self._here(member) is not None:
                    raise  # the server's trouble, not the model's
                errors[str(member.name)] = error
        if errors:
            raise UnfitError(errors)
        return Places(base=base, variants=variants)

    async def stamp(self, member: Member) -> Stamp:
        """Returns what changes whenever a file in a model's directory does."""
        path = await self._here(member)
        return () if path is None else await asyncio.to_thread(_stamp, path)

    async def _here(self, member: Member) -> Path | None:
        record = self._roster.find(str(member.name))
        return None if record is None else await self._sources.here(record.source)

    async def _find(self, member: Member) -> Place:
        if member.name is None:
            return _place((await self._bases.find(member.fingerprint)).text)
        served = self._catalog.get(member.name) or self._catalog.dormant(member.name)
        if served is not None and served.fingerprint == member.fingerprint:
            place = _place(served.text)
            if await asyncio.to_thread(place.is_unchanged):
                return place
        text = await self._read(member.name)
        if isinstance(text, AdapterSide) or text.delta is not None:
            raise replaced(member.name)
        # Files that were put back are others to the system; what they hold decides.
        if await self._planner.fingerprint(text, None) != member.fingerprint:
            raise replaced(member.name)
        return _place(text)

    async def _read(self, name: str) -> Source:
        """Validates a model's files anew; an error says whose they are."""
        try:
            return await self._sources.read(self._roster.model(name).source)
        except LinkerError as error:
            raise from_record(
                error.to_record() | {"message": f"{name}: {error.message}"}
            ) from error


def replaced(name: str) -> BadCheckpointError:
    """Returns what is said of files that are not the ones a row means."""
    return BadCheckpointError(
        f"{name}: its files are not the ones that were onboarded. Restore them, or onboard the "
        "model again."
    )


def _place(text: TextSide) -> Place:
    return Place(path=text.path, identity=text.identity)


def _stamp(path: Path) -> Stamp:
    try:
        with os.scandir(path) as entries:
            found = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
    except OSError:
        return ()
    return tuple(
        sorted((name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in found)
    )
