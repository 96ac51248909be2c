"""Both databases: a test that takes `url` or `registry` runs on each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.engine import URL, make_url

from server.registry.store import Registry
from tests.server.postgres import Cluster


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> URL:
    """An empty database."""
    if request.param == "sqlite":
        return make_url(f"sqlite:///{tmp_path / 'r.sqlite3'}")
    cluster: Cluster = request.getfixturevalue("cluster")
    return cluster.new_database()


@pytest.fixture
def registry(url: URL) -> Iterator[Registry]:
    """An empty registry."""
    registry = Registry.open(url)
    yield registry
    registry.close()
