"""Every panel is one that Grafana can draw: what it asks for, renames and colours is there."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import barchart, common, dashboard, statetimeline, xychart

from configs.grafana.generator.layout import GRAFANA
from linker_core.sharing.rungs import COARSE
from server.metrics.admission import OUTCOMES
from server.metrics.evictions import EvictionReason
from server.metrics.sequences import FINISHED_REASONS
from server.registry.records import ModelState
from tests.monitoring.boards import PANELS, SOURCE, Panel

# By type of panel, what `custom` may say.
CUSTOM: dict[str, Any] = {
    "timeseries": common.GraphFieldConfig,
    "trend": common.GraphFieldConfig,
    "table": common.TableFieldOptions,
    "barchart": barchart.FieldConfig,
    "xychart": xychart.FieldConfig,
    "state-timeline": statetimeline.FieldConfig,
}
OTHER_TYPES = {"stat", "bargauge", "heatmap"}
# Labels whose values have colours of their own.
WORDS = {
    *COARSE, *OUTCOMES, *FINISHED_REASONS, *EvictionReason, *ModelState,
    "weights", "kv", "other", "free",
}  # fmt: skip
each_panel = pytest.mark.parametrize("panel", PANELS, ids=str)


@each_panel
def test_panel_says_what_it_shows_and_what_it_means_when_empty(panel: Panel) -> None:
    defaults = panel.json["fieldConfig"]["defaults"]
    assert panel.json["description"].endswith(".")
    assert defaults["unit"]
    assert defaults["noValue"]
    assert panel.json["pluginVersion"] == GRAFANA
    assert panel.json["type"] in CUSTOM.keys() | OTHER_TYPES
    options = panel.json.get("options", {})
    if panel.json["type"] in CUSTOM.keys() - {"table"}:
        assert options["legend"]["showLegend"]


@each_panel
def test_panel_asks_the_chosen_data_source(panel: Panel) -> None:
    asked = panel.json["targets"]
    assert panel.json["datasource"] == SOURCE
    assert [target["datasource"] for target in asked] == [SOURCE] * len(asked)
    assert len({target["refId"] for target in asked}) == len(asked)
    assert all(target["instant"] is not target["range"] for target in asked)
    if panel.json["type"] != "stat":
        assert all(target["legendFormat"] for target in asked)


@each_panel
def test_field_that_is_shown_differently_is_one_that_the_panel_has(panel: Panel) -> None:
    assert set(panel.overridden()) <= panel.names() | WORDS | panel.grouped_by()


@each_panel
def test_override_is_of_something_that_the_panel_knows(panel: Panel) -> None:
    for override in panel.json["fieldConfig"]["overrides"]:
        for setting in override["properties"]:
            kind, _, key = setting["id"].partition(".")
            options: Any = CUSTOM[panel.json["type"]] if kind == "custom" else dashboard.FieldConfig
            known = options.from_json({key or kind: setting["value"]})
            read = json.loads(json.dumps(known, cls=JSONEncoder))
            assert read[key or kind] == setting["value"]


@each_panel
def test_transformations_name_columns_that_the_queries_give(panel: Panel) -> None:
    columns = panel.grouped_by() | {"N", "Time"}
    refs = {f"Value #{target['refId']}" for target in panel.json["targets"]}
    for options in panel.transformations("groupingToMatrix"):
        assert {options["rowField"], options["columnField"]} <= columns
        assert options["valueField"] == "Value"
        assert len(refs) == 1
        columns.add(f"{options['rowField']}\\{options['columnField']}")
    for options in panel.transformations("joinByField"):
        assert options["byField"] in columns
        assert len(refs) > 1
    for options in panel.transformations("organize"):
        assert options["renameByName"].keys() <= columns | refs
        assert options["indexByName"].keys() == options["renameByName"].keys()
    for axis in filter(None, [panel.json.get("options", {}).get("xField")]):
        assert axis in columns


@each_panel
def test_series_are_told_apart_by_what_they_are_grouped_by(panel: Panel) -> None:
    for target in panel.json["targets"]:
        for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
            assert label in panel.grouped_by()
