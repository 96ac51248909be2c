"""Every alert is raised in a real Prometheus by what it is there to tell of, and not before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.monitoring.prometheus import Prometheus
from tests.monitoring.promtool import rules
from tests.monitoring.provoking import PROVOKE, Stage, stage


class Watched(NamedTuple):
    """A server that things happen to, and the Prometheus that scrapes it."""

    on: Stage
    prometheus: Prometheus

    def is_raised(self, alert: str) -> bool:
        """Returns whether an alert fires, or will if it goes on like this."""
        return bool(self.prometheus.query(f'ALERTS{{alertname="{alert}"}}'))


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    directory = tmp_path_factory.mktemp("prometheus")
    with stage(tmp_path_factory.mktemp("stage")) as on:
        address = on.live.url.removeprefix("http://")
        with Prometheus.watching(address, on.scraper.key, directory / "own") as prometheus:
            prometheus.until_scraped()
            yield Watched(on, prometheus)


def test_every_alert_is_provoked() -> None:
    assert set(PROVOKE) == {rule.alert for rule in rules() if rule.alert}


@pytest.mark.parametrize("alert", PROVOKE)
def test_alert_is_raised_by_what_it_is_about(watched: Watched, alert: str) -> None:
    # A scrape that comes too late may raise one for a moment.
    watched.prometheus.until(lambda: not watched.is_raised(alert))
    with PROVOKE[alert](watched.on):
        watched.prometheus.until(lambda: watched.is_raised(alert))
