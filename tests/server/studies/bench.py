"""Studies over a real registry and pretended workers' processes, in a test's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from linker_core.errors import LinkerError
from linker_core.weights.checkpoint import Checkpoint
from server.metrics.serving import ServingMetrics
from server.onboarding.roster import Roster
from server.registry.records import JobRecord, JobStatus, ModelRecord, ModelState, StudyRecord
from server.registry.store import Registry
from server.studies.attempt import Attempt
from server.studies.failures import Failure
from server.studies.families import Family, Member
from server.studies.files import Place, Places, Stamp, UnfitError
from server.studies.studies import Studies, Timing
from server.studies.worker import StudyWorker
from tests.server.studies.fake_worker import FAKE_STUDY, Behaviour, requests

DEADLINE_S = 60.0
NOW = 1000.0  # where the bench's clock begins
AT_ONCE = Timing(settle_s=0.0, look_s=0.01, backoff_s=60.0, max_backoff_s=200.0)


class Folders:
    """Finds checkpoints by the names of their models, unless told to fail."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.error: Exception | None = None
        self.unfit: dict[str, LinkerError] = {}  # by variant
        self.stamps: dict[str, int] = {}

    async def find(self, family: Family) -> Places:
        if self.error is not None:
            raise self.error
        names = {str(member.name) for member in family.variants}
        if errors := {name: error for name, error in self.unfit.items() if name in names}:
            raise UnfitError(errors)
        assert family.base is not None
        return Places(
            base=self._place(family.base),
            variants={str(member.name): self._place(member) for member in family.variants},
        )

    async def stamp(self, member: Member) -> Stamp:
        return ((str(member.name), self.stamps.get(str(member.name), 0), 0, 0, 0),)

    def _place(self, member: Member) -> Place:
        path = self._root / str(member.name)
        with Checkpoint.open(path) as checkpoint:
            return Place(path=path, identity=checkpoint.identity)


class Bench:
    """One registry and, one after the other, the servers that use it.

    Args:
        root: Holds checkpoints `base`, `near` and `far`; more are copies of the last.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base = root / "base"
        self.registry = Registry.open(f"sqlite:///{root / 'registry.sqlite3'}")
        metrics = ServingMetrics(CollectorRegistry(), rejection_reasons=())
        self.roster = Roster(registry=self.registry, metrics=metrics)
        self.folders = Folders(root)
        self.closing = asyncio.Event()
        self.now = NOW
        self.num_looks = 0
        self._position = 0

    @classmethod
    async def open(cls, family: Path, folder: Path) -> Bench:
        for name in ("base", "near", "far"):
            shutil.copytree(family / name, folder / name)
        bench = cls(folder)
        for name in ("base", "near", "far"):
            await bench.add(name)
        return bench

    async def add(self, name: str, digest: str | None = None) -> None:
        """Makes a model known."""
        if not (self.root / name).exists():
            shutil.copytree(self.root / "far", self.root / name)
        self._position += 1
        donor = None if name == "base" else "base"
        plan: dict[str, Any] = {
            "policy": "exact",
            "donor_fingerprint": donor and "of base",
            "rungs": {},
        }
        await self.roster.save(
            ModelRecord(
                name=name,
                source=str(self.root / name),
                request={},
                state=ModelState.READY,
                position=self._position,
                created_at=1.0,
                donor=donor,
                family="base",
                fingerprint=digest or f"of {name}",
                plan=plan,
            )
        )

    async def begin_job(self) -> JobRecord:
        job = JobRecord(id="job", model="far", request={}, status=JobStatus.RUNNING, created_at=1.0)
        await self.roster.save(job)
        return job

    def studies(
        self, *, timing: Timing = AT_ONCE, busy: bool = False, is_enabled: bool = True
    ) -> Studies:
        return Studies(
            roster=self.roster,
            registry=self.registry,
            files=self.folders,
            worker=StudyWorker(FAKE_STUDY, busy=lambda: busy),
            closing=self.closing,
            is_enabled=is_enabled,
            timing=timing,
            clock=lambda: self.now,
        )

    @asynccontextmanager
    async def running(
        self, *, timing: Timing = AT_ONCE, is_enabled: bool = True
    ) -> AsyncIterator[Studies]:
        """Runs studies as a server does, until the block ends as a server does."""
        studies = self.studies(timing=timing, is_enabled=is_enabled)
        look = studies._look

        async def counted() -> None:
            await look()
            self.num_looks += 1

        studies._look = counted  # type: ignore[method-assign]
        task = asyncio.ensure_future(studies.run())
        try:
            yield studies
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                await asyncio.sleep(0.005)

    async def looks(self) -> None:
        """Waits until a server has looked at what there is to do, and begun what is due."""
        seen = self.num_looks
        await self.until(lambda: self.num_looks >= seen + 3)

    def tell(self, behaviour: Behaviour) -> None:
        behaviour.tell(self.base)

    def requests(self) -> list[Mapping[str, object]]:
        return list(requests(self.base))

    def rows(self) -> dict[str, StudyRecord]:
        return {study.key: study for study in self.registry.studies()}


def finished(studies: Studies) -> StudyRecord | None:
    return studies.finished().get("base")


def attempt(studies: Studies) -> Attempt | None:
    return studies.attempt(studies.families()["base"])


def failure(studies: Studies) -> Failure | None:
    return studies.failure(studies.families()["base"])


def error_of(studies: Studies) -> LinkerError:
    found = failure(studies)
    assert found is not None
    return found.error


def is_running(pid: object) -> bool:
    try:
        return "State:\tZ" not in Path("/proc", str(pid), "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


Scenario = Callable[[Bench], Awaitable[None]]
Play = Callable[[Scenario], None]


def done_of(request: Any) -> list[str]:
    """Returns the tensors that a worker was told to be done, in order."""
    return sorted(record["name"] for record in request["done"])
