"""Checkpoints and servers that the server's tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.cached_scan import CACHE_VARIABLE
from tests.server.live import LiveServer, live_server
from tests.server.postgres import cluster
from tests.tiny import make_checkpoint, make_variant

__all__ = ["cluster"]  # a fixture


@pytest.fixture(scope="session", autouse=True)
def _scans(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where `cached_scan` remembers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("scans")))
        yield


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a donor `base`, its variants `near` and `far`, and two models of other shapes."""
    root = tmp_path_factory.mktemp("models")
    make_checkpoint(root / "base")
    make_variant(root / "near", root / "base", scale=0.01)
    make_variant(root / "far", root / "base", scale=0.5, seed=2)
    make_checkpoint(root / "other", hidden=64, layers=1, seed=3)
    make_checkpoint(root / "tall", layers=3, seed=4)
    return root


@pytest.fixture(scope="package")
def server(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server of `base` and `near` over the fake engine, for tests that change nothing."""
    models = {"base": family / "base", "near": family / "near"}
    with live_server(tmp_path_factory.mktemp("state"), models=models, root=family) as live:
        live.until_ready()
        yield live


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """A donor `base` and its variant `near`, for one test to change as it likes."""
    make_checkpoint(tmp_path / "base")
    make_variant(tmp_path / "near", tmp_path / "base", scale=0.01)
    return {"base": tmp_path / "base", "near": tmp_path / "near"}
