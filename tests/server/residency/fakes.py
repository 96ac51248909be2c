"""A device of so many bytes with its catalog, rows and engine, without processes or tensors."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from prometheus_client import CollectorRegistry

from linker_core.engine.messages import ModelBytes, Snapshot
from linker_core.errors import (
    ConflictError,
    EngineFailureError,
    InsufficientCapacityError,
    ModelNotFoundError,
    NotReadyError,
)
from server.bridge.client import EngineClient
from server.metrics.evictions import EvictionMetrics, EvictionReason
from server.registry.records import ModelRecord, ModelState
from server.residency.catalog import Catalog, ServedModel, TextSide
from server.residency.evictions import Evictions
from server.residency.room import Room
from server.residency.rows import Outlook

KV_BYTES = 50  # of a family
_DEADLINE_S = 20.0  # of a test that hangs


def in_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Runs a test in an event loop of its own."""

    @functools.wraps(test)
    def run() -> None:
        async def within() -> None:
            async with asyncio.timeout(_DEADLINE_S):
                await test()

        asyncio.run(within())

    return run


class FakeRows:
    """Rows that are only shown."""

    def __init__(self) -> None:
        self.records: dict[str, ModelRecord] = {}
        self.outlooks: dict[str, Outlook] = {}
        self.num_writes = 0
        self.locked = False

    def find(self, name: str) -> ModelRecord | None:
        return self.records.get(name)

    def named(self, name: str) -> ModelRecord:
        for record in self.records.values():
            if name in (record.name, record.alias):
                return record
        raise ModelNotFoundError(f"no {name}")

    def model_of(self, name: str) -> str:
        return name

    def outlook(self, name: str) -> Outlook | None:
        return self.outlooks.get(name)

    def amend(self, name: str, **changes: Any) -> None:
        self.records[name] = replace(self.records[name], **changes)

    async def write_later(self) -> None:
        if self.locked:
            raise NotReadyError("The registry is locked.")
        self.num_writes += 1


class FakeClient:
    """An engine that counts bytes; `stuck` makes unloading wait, `reports` whether it tells."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.held: dict[str, int] = {}
        self.donors: dict[str, str | None] = {}
        self.reservations: dict[str, int] = {}
        self.closed = asyncio.Event()
        self.reports = True
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.unloaded: list[str] = []
        self.snapshot: Snapshot | None = None
        self.report()

    @property
    def free_bytes(self) -> int:
        families = sum(donor is None for donor in self.donors.values())
        taken = sum(self.held.values()) + families * KV_BYTES + sum(self.reservations.values())
        return self.budget_bytes - taken

    def report(self) -> None:
        if not self.reports:
            return
        self.snapshot = Snapshot(
            models={
                name: ModelBytes(logical=held, unique=held, shared=0)
                for name, held in self.held.items()
            },
            load={},
            device="cpu",
            device_weight_bytes=sum(self.held.values()),
            device_kv_bytes=0,
            device_free_bytes=self.free_bytes,
            reserved_bytes=sum(self.reservations.values()),
            kv_usage_ratio=0.0,
            num_preemptions=0,
        )

    def load(self, name: str, nbytes: int, donor: str | None) -> None:
        needed = nbytes + (KV_BYTES if donor is None else 0)
        if needed > self.free_bytes:
            raise InsufficientCapacityError(f"{needed} > {self.free_bytes}")
        self.held[name], self.donors[name] = nbytes, donor
        self.report()

    async def unload(self, name: str) -> None:
        gone = asyncio.ensure_future(self.closed.wait())
        go_on = asyncio.ensure_future(self.go_on.wait())
        await asyncio.wait({gone, go_on}, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        go_on.cancel()
        if self.closed.is_set():
            raise EngineFailureError("The engine is gone.")
        if name in self.donors.values():
            raise ConflictError(f"{name} is a donor.")
        self.held.pop(name, None)
        self.donors.pop(name, None)
        self.unloaded.append(name)
        self.report()

    async def reserve(self, name: str, nbytes: int) -> None:
        if nbytes > self.free_bytes:
            raise InsufficientCapacityError(f"{nbytes} > {self.free_bytes}")
        self.reservations[name] = nbytes
        self.report()

    def release(self, name: str) -> None:
        self.reservations.pop(name, None)
        self.report()

    def die(self) -> None:
        self.closed.set()


class Device:
    """All of it together; models appear with `put`."""

    def __init__(self, budget_bytes: int) -> None:
        self.now = 1000.0
        self.catalog = Catalog(clock=lambda: self.now)
        self.rows = FakeRows()
        self.client = FakeClient(budget_bytes)
        self.metrics = CollectorRegistry()
        self.evictions = Evictions(
            catalog=self.catalog,
            rows=self.rows,
            engine=self.engine,
            metrics=EvictionMetrics(self.metrics),
        )
        self.room = Room(
            catalog=self.catalog,
            rows=self.rows,
            engine=self.engine,
            evictions=self.evictions,
            kv_bytes=lambda _: KV_BYTES,
        )

    def engine(self) -> EngineClient:
        if self.client.closed.is_set():
            raise NotReadyError("There is no engine.")
        return cast(EngineClient, self.client)

    def put(
        self, name: str, nbytes: int, *, donor: str | None = None, idle_s: float = 0, **row: Any
    ) -> None:
        """Makes a model resident, idle for so long."""
        self.know(name, donor=donor, state=ModelState.READY, **row)
        self.load(name, nbytes, donor=donor, idle_s=idle_s)

    def know(self, name: str, **row: Any) -> None:
        """Adds a row."""
        values: dict[str, Any] = {
            "source": name,
            "request": {},
            "state": ModelState.UNLOADED,
            "position": 0,
        }
        record = ModelRecord(name=name, created_at=0.0, **(values | row))
        self.rows.records[name] = record

    def load(self, name: str, nbytes: int, *, donor: str | None = None, idle_s: float = 0) -> None:
        """Puts a known model on the device and opens it."""
        self.client.load(name, nbytes, donor)
        self.now -= idle_s
        self.catalog.publish(served(name, donor))
        self.now += idle_s

    def state(self, name: str) -> ModelState:
        return self.rows.records[name].state

    def evicted(self, reason: EvictionReason) -> float:
        labels = {"reason": reason.value}
        value = self.metrics.get_sample_value("linker_evictions_total", labels)
        assert value is not None
        return value


def served(name: str, donor: str | None) -> ServedModel:
    """Returns a model without files."""
    return ServedModel(
        name=name,
        donor=donor,
        position=0,
        created_at=0.0,
        fingerprint=name,
        max_model_len=8,
        text=cast(TextSide, SimpleNamespace(path=Path(name), config=None, tokenizer=object())),
    )


async def settle() -> None:
    """Lets every task run until it waits for something that nobody has done yet."""
    for _ in range(50):
        await asyncio.sleep(0)
