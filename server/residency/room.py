"""The device's memory as one budget: whatever takes of it asks here, one after the other.

Event loop only. Loads and reservations that would not fit have idle models evicted; nobody is
evicted for what would not fit even then.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Container
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TypeVar

from linker_core.engine.messages import Snapshot
from linker_core.errors import InsufficientCapacityError, NotReadyError
from linker_core.residency.eviction import Policy, by_bytes_and_idle_time
from linker_core.weights.architecture import ModelConfig
from server.bridge.client import EngineClient
from server.metrics.evictions import EvictionReason
from server.residency.catalog import Catalog
from server.residency.evictions import Evictions
from server.residency.reckoning import Holder, evictable_bytes, passing_bytes, who_leaves
from server.residency.rows import Rows

_RETRY_AFTER_S = 1.0  # requests and tuners end; nobody knows when
_Result = TypeVar("_Result")
Names = frozenset[str]


class Room:
    """Serialises what takes device memory, and makes room for it.

    Args:
        catalog: The resident models.
        rows: Says who is pinned.
        engine: Returns the engine, or raises `NotReadyError`; its last report says what is free.
        evictions: Takes models out.
        kv_bytes: What the KV cache of a family takes, which leaves with its last model.
        policy: Whom to evict first; see `linker_core.residency.eviction`.
    """

    def __init__(
        self,
        *,
        catalog: Catalog,
        rows: Rows,
        engine: Callable[[], EngineClient],
        evictions: Evictions,
        kv_bytes: Callable[[ModelConfig], int],
        policy: Policy = by_bytes_and_idle_time,
    ) -> None:
        self._catalog = catalog
        self._rows = rows
        self._engine = engine
        self._evictions = evictions
        self._kv_bytes = kv_bytes
        self._policy = policy
        self._turn = asyncio.Lock()
        self._reserved: dict[str, tuple[EngineClient, int]] = {}  # name -> whose, bytes

    # --- taking -------------------------------------------------------------------------------

    @asynccontextmanager
    async def taking(
        self,
        nbytes: int,
        *,
        what: str,
        keep: Names = frozenset(),
        may_evict: bool = True,
        founds: bool = False,
    ) -> AsyncIterator[None]:
        """Sees to it that so many bytes are free, and that nobody else takes them meanwhile.

        Whoever holds a model's turn may wait here, never the other way round.

        Args:
            nbytes: To be free.
            what: What for, as in "The model 'a'".
            keep: Models that are not evicted for it.
            may_evict: Whether anybody is.
            founds: Whether it is for a model that could do with less as a variant of a donor.

        Raises:
            InsufficientCapacityError: They cannot be freed, with what is needed, what is free and
                what evicting would give; nobody was evicted. It has `retry_after_s` where requests
                or tuners that run now are all that is in the way.
            LinkerError: There is no engine, or it died on the way.
        """
        async with self._turn:
            await self._make(nbytes, what=what, keep=keep, may_evict=may_evict, founds=founds)
            yield

    async def fit(
        self,
        nbytes: int,
        work: Callable[[], Awaitable[_Result]],
        *,
        what: str,
        keep: Names = frozenset(),
        may_evict: bool = True,
        founds: bool = False,
    ) -> _Result:
        """Does what takes so many bytes, in their `taking`.

        Where the engine finds that it takes more than was predicted, others leave and it is tried
        again, until twice the bytes are free.

        Raises:
            InsufficientCapacityError: See `taking`; or the engine refuses all the same.
            LinkerError: See `taking`, and whatever `work` raises.
        """
        async with self.taking(nbytes, what=what, keep=keep, may_evict=may_evict, founds=founds):
            while True:
                try:
                    return await work()
                except InsufficientCapacityError as error:
                    if not may_evict or not await self._evict_next(2 * nbytes, keep):
                        raise self._engine_refused(error, keep) from error

    @asynccontextmanager
    async def reserving(
        self,
        client: EngineClient,
        name: str,
        nbytes: int,
        *,
        what: str,
        keep: Names = frozenset(),
    ) -> AsyncIterator[None]:
        """Sets memory of the device aside for another process.

        Args:
            client: The engine that lends it; its end ends the reservation.
            name: Unique among reservations.
            nbytes: How much.
            what: See `taking`.
            keep: See `taking`.

        Raises:
            LinkerError: See `fit`.
        """

        async def reserve() -> None:
            await client.reserve(name, nbytes)

        await self.fit(nbytes, reserve, what=what, keep=keep)
        self._reserved[name] = (client, nbytes)
        try:
            yield
        finally:
            del self._reserved[name]
            client.release(name)
            self._catalog.note_change()

    async def close_one(self, *, keep: Names) -> None:
        """Takes one of the models that are in use away from those who come later.

        For whoever has waited long enough beside models whose requests never cease: one of them is
        closed to new requests, which wait until it is back, and leaves with its last. It is the one
        that the policy asks first by how long each has been there. Nobody is closed while another
        is on its way out, nor who is pinned or leaned on.

        Raises:
            LinkerError: It stays; see `Evictions.evict_used`.
        """
        client = self._engine()
        if client.snapshot is None or self._leaving(client.snapshot):
            return
        holders = self._holders(client.snapshot, keep)
        donors = {holder.donor for holder in holders}
        used = [
            replace(holder, idle=True, idle_s=self._catalog.resident_s(holder.name))
            for holder in holders
            if holder.passing
            and holder.name not in donors
            and self._evictions.is_only_used(holder.name)
        ]
        if chosen := who_leaves(used, 1, 0, self._policy):
            await self._evictions.evict_used(chosen[0])

    # --- asking -------------------------------------------------------------------------------

    def client(self) -> EngineClient | None:
        """Returns the engine that has the memory, or None while there is none."""
        try:
            return self._engine()
        except NotReadyError:
            return None

    def would_evict(self, nbytes: int, *, keep: Names = frozenset()) -> list[str] | None:
        """Returns who would leave now so that so many bytes are free; None: it does not fit."""
        client = self.client()
        if client is None or client.snapshot is None:
            return []
        holders, free = self._holders(client.snapshot, keep), self._free_bytes(client)
        return who_leaves(holders, nbytes, free, self._policy)

    def check(self, nbytes: int, *, what: str, keep: Names = frozenset()) -> None:
        """Refuses what would not fit even once everything that runs now has ended.

        Args:
            nbytes: To be free.
            what: See `taking`.
            keep: See `taking`; nobody, where it is for a model that founds a family.

        Raises:
            InsufficientCapacityError: It would not; see `taking`.
        """
        client = self.client()
        if client is None or client.snapshot is None or nbytes <= self._free_bytes(client):
            return
        holders, founds = self._holders(client.snapshot, keep), not keep
        error = self._refusal(nbytes, client, holders, what=what, founds=founds)
        if error.retry_after_s is None:
            raise error

    # --- making room --------------------------------------------------------------------------

    async def _make(
        self, nbytes: int, *, what: str, keep: Names, may_evict: bool, founds: bool
    ) -> None:
        needed: set[str] = set()  # who turned out not to be idle
        while True:
            await self._evictions.settled()  # what left meanwhile is free in the report below
            client = self._engine()
            if client.snapshot is None or nbytes <= self._free_bytes(client):
                return
            holders = self._holders(client.snapshot, keep, needed)
            if not may_evict:
                holders = [replace(holder, idle=False, passing=False) for holder in holders]
            leaving = who_leaves(holders, nbytes, self._free_bytes(client), self._policy)
            if leaving is None:
                raise self._refusal(
                    nbytes, client, holders, what=what, founds=founds, may_evict=may_evict
                )
            if not await self._evictions.evict_idle(leaving[0], EvictionReason.CAPACITY):
                needed.add(leaving[0])

    async def _evict_next(self, enough_bytes: int, keep: Names) -> bool:
        """Evicts whoever the policy asks first; False if nobody may, or there is enough."""
        client = self._engine()
        if client.snapshot is None or self._free_bytes(client) >= enough_bytes:
            return False
        holders = self._holders(client.snapshot, keep)
        free = self._free_bytes(client)
        leaving = who_leaves(holders, free + 1, free, self._policy)
        if not leaving:
            return False
        return await self._evictions.evict_idle(leaving[0], EvictionReason.CAPACITY)

    def _free_bytes(self, client: EngineClient) -> int:
        """Returns what is free; a reservation is from when it is given back."""
        assert client.snapshot is not None
        released = client.snapshot.reserved_bytes - self._reserved_bytes(client)
        return client.snapshot.device_free_bytes + max(0, released)

    def _reserved_bytes(self, client: EngineClient) -> int:
        return sum(nbytes for lender, nbytes in self._reserved.values() if lender is client)

    def _holders(
        self, snapshot: Snapshot, keep: Names, needed: Container[str] = ()
    ) -> list[Holder]:
        """Returns every resident model as what could give memory back.

        Args:
            snapshot: Says what each holds.
            keep: Models that stay.
            needed: Models that stay for as long as what runs now.
        """
        holders = []
        for model in self._catalog.models():
            record, held = self._rows.find(model.name), snapshot.models.get(model.name)
            if held is None:
                continue  # the engine has not said so yet
            stays = model.name in keep or (record is not None and record.pinned)
            busy = model.name in needed or not self._evictions.is_idle(model.name)
            founds = model.donor is None
            holders.append(
                Holder(
                    name=model.name,
                    donor=model.donor,
                    nbytes=held.unique + (self._kv_bytes(model.text.config) if founds else 0),
                    idle_s=self._catalog.idle_s(model.name),
                    idle=not stays and not busy,
                    passing=not stays and busy,
                )
            )
        return holders

    def _refusal(
        self,
        nbytes: int,
        client: EngineClient,
        holders: list[Holder],
        *,
        what: str,
        founds: bool,
        may_evict: bool = True,
    ) -> InsufficientCapacityError:
        """Returns the error that says why so many bytes cannot be had from these holders."""
        assert client.snapshot is not None
        free, evictable = self._free_bytes(client), evictable_bytes(holders)
        later = self._later_bytes(client, client.snapshot, holders)
        passing = nbytes <= free + evictable + later
        gain = f"evicting what is idle and not pinned would give {evictable}"
        message = (
            f"{what} needs {nbytes} bytes of device memory; {max(free, 0)} are free, and "
            f"{gain if may_evict else 'no model leaves for it'}. "
        )
        if passing:
            message += f"{later} more are in use now; try again when that has ended."
        elif founds:
            message += (
                "Unload or unpin a model, raise the memory budget, or onboard it as a variant of a "
                "donor."
            )
        else:
            message += "Unload or unpin a model, or raise the memory budget."
        return InsufficientCapacityError(message, retry_after_s=_RETRY_AFTER_S if passing else None)

    def _engine_refused(
        self, error: InsufficientCapacityError, keep: Names
    ) -> InsufficientCapacityError:
        client = self._engine()
        later = 0
        if client.snapshot is not None:
            holders = self._holders(client.snapshot, keep)
            later = self._later_bytes(client, client.snapshot, holders)
        return InsufficientCapacityError(
            error.message, param=error.param, retry_after_s=_RETRY_AFTER_S if later else None
        )

    def _later_bytes(self, client: EngineClient, snapshot: Snapshot, holders: list[Holder]) -> int:
        """Returns what comes free by itself: reservations, models in use, and leaving ones."""
        gone = sum(snapshot.models[name].unique for name in self._leaving(snapshot))
        reserved = self._reserved_bytes(client)
        return passing_bytes(holders) + reserved + snapshot.leaving_bytes + gone

    def _leaving(self, snapshot: Snapshot) -> list[str]:
        """Returns what takes no requests any more but is still in the engine."""
        return [name for name in snapshot.models if self._catalog.get(name) is None]
