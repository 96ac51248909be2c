"""What the tests of onboarding share: a family of their own, and a scanner that can be held up."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.registry.store import Registry
from tests.server.fake_tuner import RUNGS
from tests.server.live import LiveServer


def open_registry(state: Path) -> Registry:
    return Registry.open(f"sqlite:///{state / 'registry.sqlite3'}")


def loads(path: Path) -> list[str]:
    """Returns the names under which a checkpoint was loaded, in order."""
    log = path / "loads.log"
    return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []


def residual(path: Path, rungs: Mapping[str, str]) -> Path:
    """Has the pretended tuner store every matrix of a variant on one of these rungs, by KL."""
    (path / RUNGS).write_text(json.dumps(rungs))
    return path


def delta_folders(state: Path) -> list[Path]:
    """Returns what lies where compressed variants are kept."""
    directory = state / "deltas"
    return sorted(directory.iterdir()) if directory.exists() else []


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdup:
    """Scans that wait: `begun` says that one wants to begin, `go_on` lets them."""

    begun: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)


@contextmanager
def held_up_scans(server: LiveServer) -> Iterator[Holdup]:
    """Lets no scan begin before the block ends, or before it says so."""
    planner = server.services.onboarder._jobs._arrivals._planner
    scanner = planner._scanner
    planner._fingerprints._digests.clear()  # what was hashed before would not be again
    run = scanner.run
    holdup = Holdup()

    async def held_up(*args: Any, **kwargs: Any) -> Any:
        holdup.begun.set()
        await asyncio.to_thread(holdup.go_on.wait)
        return await run(*args, **kwargs)

    scanner.run = held_up  # type: ignore[method-assign]
    try:
        yield holdup
    finally:
        scanner.run = run  # type: ignore[method-assign]
        holdup.go_on.set()


@contextmanager
def locked_registry(server: LiveServer) -> Iterator[None]:
    """Holds the registry's write lock."""
    with server.services.registry._engine.connect() as blocker:
        blocker.exec_driver_sql("BEGIN IMMEDIATE")
        yield
        blocker.rollback()


def until_job(server: LiveServer, job_id: str, status: str) -> dict[str, Any]:
    """Waits for the end of a job, which is `status`."""
    job: dict[str, Any] = {}

    def ended() -> bool:
        job.update(server.client.get(f"/models/jobs/{job_id}").json())
        return job["status"] not in ("queued", "running")

    server.until(ended)
    assert job["status"] == status, job
    return job
