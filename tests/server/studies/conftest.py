"""A server that studies a family of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.live import LiveServer
from tests.server.studies.bench import Bench, Play, Scenario
from tests.server.studies.copies import copied, studying


@pytest.fixture
def root(family: Path, tmp_path: Path) -> Path:
    """A copy of the family, free to change."""
    return copied(family, tmp_path)


@pytest.fixture
def live(root: Path, tmp_path: Path) -> Iterator[LiveServer]:
    """A server over it."""
    with studying(root, tmp_path / "state") as server:
        yield server


@pytest.fixture
def play(family: Path, tmp_path: Path) -> Play:
    """Runs a scenario on a bench of its own."""

    async def whole(scenario: Scenario) -> None:
        bench = await Bench.open(family, tmp_path)
        try:
            await scenario(bench)
        finally:
            bench.registry.close()

    return lambda scenario: asyncio.run(whole(scenario))
