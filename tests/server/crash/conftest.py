"""The nursery that all of these tests share, and what they onboard."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.crash.servers import Nursery, nursery
from tests.server.crash.sources import Sources, make_base
from tests.server.crash.trials import Trial
from tests.server.onboarding.fake_hub import FakeHub


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with nursery(tmp_path_factory.mktemp("nursery")) as running:
        yield running


@pytest.fixture(scope="session")
def shipped(forks: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a donor `base` and the delta of a variant of it, `shipped`."""
    root = tmp_path_factory.mktemp("shipped")
    make_base(root)
    with FakeHub().running() as hub, Trial(forks, root, Sources(root, root, hub)) as trial:
        sources = trial.sources
        request = sources.next("budget")
        response = trial.server.onboard(request.name, request.source, donor="base")
        assert response.status_code == 201, response.text
        [folder] = (root / "state" / "deltas").iterdir()
        shutil.copytree(folder, root / "shipped")
    return root


@pytest.fixture
def trial(forks: Nursery, shipped: Path, tmp_path: Path) -> Iterator[Trial]:
    """A server with a ready donor `base` over a new state directory."""
    root = tmp_path / "models"
    shutil.copytree(shipped / "base", root / "base")
    with (
        FakeHub().running() as hub,
        Trial(forks, tmp_path, Sources(root, shipped / "shipped", hub)) as running,
    ):
        yield running
