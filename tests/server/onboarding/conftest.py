from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from server.bridge.supervisor import SupervisionLimits
from server.registry import database
from tests.server.live import LiveServer, live_server

LIMITS = SupervisionLimits(poll_s=0.05, backoff_s=0.01)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A locked registry is given up at once."""
    settings = (*database._SETTINGS["sqlite"], "PRAGMA busy_timeout=10")
    monkeypatch.setattr(database, "_SETTINGS", {**database._SETTINGS, "sqlite": settings})


@pytest.fixture
def live(tmp_path: Path, models: dict[str, Path]) -> Iterator[LiveServer]:
    with live_server(tmp_path / "state", models=models, root=tmp_path, limits=LIMITS) as server:
        server.until_ready()
        yield server
