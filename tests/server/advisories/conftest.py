"""The servers that advisories are replayed against, and the check that nobody else noticed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.advisories.attacks import Bystander
from tests.server.live import LiveServer, live_server
from tests.tiny import make_checkpoint, make_variant


@pytest.fixture(scope="package")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that sources may lie in: two models, and what attacks put beside them."""
    root = tmp_path_factory.mktemp("root")
    make_checkpoint(root / "base", tie=False)  # a tied random model repeats one token
    make_variant(root / "near", root / "base", scale=0.01)
    return root


@pytest.fixture(scope="package")
def served(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    models = {"base": root / "base", "near": root / "near"}
    with live_server(tmp_path_factory.mktemp("state"), models=models, root=root) as live:
        live.until_ready()
        yield live


@pytest.fixture
def target(served: LiveServer) -> Iterator[LiveServer]:
    """The whole server over the fake engine; fails if an attack reaches anybody else."""
    bystander = Bystander(served)
    yield served
    bystander.check()


@pytest.fixture(scope="package")
def computing(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    settings = {"engine": {"max_model_len": 128, "kv_cache_tokens": 1024}}
    with live_server(
        tmp_path_factory.mktemp("state"),
        models={"base": root / "base", "near": root / "near"},
        root=root,
        engine_command=None,
        settings={**settings, "sharing": {"policy": "exact"}},
    ) as live:
        live.until_ready()
        yield live


@pytest.fixture
def real(computing: LiveServer) -> Iterator[LiveServer]:
    """The whole server over the real engine; answers of others are compared to the last bit."""
    bystander = Bystander(computing)
    yield computing
    bystander.check()


@pytest.fixture
def source(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the donor inside the root, to be spoilt."""
    path = root / tmp_path_factory.mktemp("model").name
    shutil.copytree(root / "base", path)
    yield path
    shutil.rmtree(path, ignore_errors=True)
