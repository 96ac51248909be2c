from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from server.bridge.supervisor import SupervisionLimits
from server.registry import store
from tests.server.live import LiveServer, live_server
from tests.tiny import make_checkpoint, make_variant

LIMITS = SupervisionLimits(poll_s=0.05, backoff_s=0.01)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A locked registry is given up at once."""
    pragmas = (*store._SQLITE_PRAGMAS, "PRAGMA busy_timeout=10")
    monkeypatch.setattr(store, "_SQLITE_PRAGMAS", pragmas)


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    make_checkpoint(tmp_path / "base")
    make_variant(tmp_path / "near", tmp_path / "base", scale=0.01)
    return {"base": tmp_path / "base", "near": tmp_path / "near"}


@pytest.fixture
def live(tmp_path: Path, models: dict[str, Path]) -> Iterator[LiveServer]:
    with live_server(tmp_path / "state", models=models, root=tmp_path, limits=LIMITS) as server:
        server.until_ready()
        yield server
