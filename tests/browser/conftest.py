"""A browser, and the servers that it visits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from playwright.sync_api import Browser

from server.bridge.supervisor import SupervisionLimits
from tests.browser.chromium import chromium
from tests.browser.models import make_family, make_faulty_family
from tests.browser.visitor import Visitor
from tests.server.cached_scan import CACHE_VARIABLE
from tests.server.fake_tuner import BLOCKER
from tests.server.live import LiveServer, live_server
from tests.tiny import make_checkpoint, make_variant

LIMITS = SupervisionLimits(poll_s=0.05, stall_s=5.0, stall_kill_s=3600.0, backoff_s=0.01)
# Of the real server: room for what measuring and encoding take beside the models.
ROOMY = {"kv_cache_tokens": 4096, "memory_budget": 1 << 30}
GENEROUS, STRICT = 0.05, 0.002  # nats


class Held(NamedTuple):
    """A server whose tuner does not come to an end with the variant `near` until it may."""

    live: LiveServer
    near: Path

    def let_go(self) -> None:
        (self.near / BLOCKER).unlink()


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture
def visitor(browser: Browser, tmp_path: Path) -> Iterator[Visitor]:
    """Whoever it is, no window of theirs may report an error or ask another server."""
    folder = os.environ.get("LINKER_SCREENSHOTS")
    visiting = Visitor(browser, Path(folder) if folder else tmp_path / "screenshots")
    yield visiting
    assert visiting.leave() == []


@pytest.fixture(scope="session", autouse=True)
def _scans(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where `cached_scan` remembers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("scans")))
        yield


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="session")
def faulty_family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_faulty_family(tmp_path_factory.mktemp("faulty"))


@pytest.fixture(scope="package")
def showroom(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """The real server, variants on every rung and their prices, for tests that change nothing."""
    with live_server(
        tmp_path_factory.mktemp("showroom"),
        models={"base": family / "base"},
        root=family,
        engine_command=None,
        settings={"engine": ROOMY, "sharing": {"policy": "budget"}},
    ) as live:
        live.until_ready()
        for name, budget in (("near", GENEROUS), ("mixed", STRICT), ("far", GENEROUS)):
            answer = live.onboard(name, family / name, donor="base", budget_kl=budget)
            assert answer.status_code == 201, answer.text
        yield live


@pytest.fixture
def faulty(faulty_family: Path, tmp_path: Path) -> Iterator[LiveServer]:
    """A server over the fake engine, whose prompts ask for faults."""
    models = {name: faulty_family / name for name in ("base", "near")}
    with live_server(tmp_path / "state", models=models, root=faulty_family, limits=LIMITS) as live:
        live.until_ready()
        yield live


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Held]:
    """A server of a donor alone, over the fakes."""
    base = make_checkpoint(tmp_path / "base")
    near = make_variant(tmp_path / "near", base, scale=0.01)
    (near / BLOCKER).touch()
    with live_server(tmp_path / "state", models={"base": base}, root=tmp_path) as live:
        live.until_ready()
        yield Held(live, near)
        (near / BLOCKER).unlink(missing_ok=True)
