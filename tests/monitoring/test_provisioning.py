"""Compose gives Grafana the dashboards, and a data source that they begin with."""

from __future__ import annotations

from pathlib import Path

import yaml

from configs.grafana.generator.layout import GRAFANA
from tests.monitoring.boards import BOARDS, Json
from tests.monitoring.promtool import PROJECT


def provisioned(path: str) -> Json:
    loaded: Json = yaml.safe_load((PROJECT / "configs/grafana/provisioning" / path).read_text())
    return loaded


def test_compose_shows_the_dashboards_with_no_click() -> None:
    compose = yaml.safe_load((PROJECT / "docker-compose.yml").read_text())
    grafana = compose["services"]["grafana"]
    mounts = dict(volume.split(":")[:2] for volume in grafana["volumes"])
    [provider] = provisioned("dashboards/linker.yaml")["providers"]
    assert mounts["./configs/grafana/dashboards"] == provider["options"]["path"]
    assert mounts["./configs/grafana/provisioning"] == "/etc/grafana/provisioning"
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert str(home.parent) == provider["options"]["path"]
    assert home.stem in BOARDS
    assert grafana["environment"]["GF_AUTH_ANONYMOUS_ENABLED"] == "true"
    assert grafana["image"] == f"grafana/grafana:{GRAFANA}"


def test_grafana_asks_nobody_outside() -> None:
    compose = yaml.safe_load((PROJECT / "docker-compose.yml").read_text())
    said = compose["services"]["grafana"]["environment"]
    disabled = [name for name in said if name.endswith("_DISABLED") or "_DISABLE_" in name]
    enabled = [
        name for name in said if name.startswith(("GF_ANALYTICS", "GF_NEWS", "GF_SNAPSHOTS"))
    ]
    assert (len(disabled), len(enabled)) == (3, 5)
    assert {said[name] for name in disabled} == {"true"}
    assert {said[name] for name in enabled} == {"false"}


def test_data_source_is_the_one_that_dashboards_begin_with() -> None:
    [source] = provisioned("datasources/prometheus.yaml")["datasources"]
    prometheus = yaml.safe_load((PROJECT / "configs/prometheus/prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
    for board in BOARDS.values():
        assert board["templating"]["list"][0]["current"]["value"] == source["uid"]
