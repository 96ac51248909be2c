"""The dashboards are what is written here, in a form that Grafana takes as it is."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import pairwise

import pytest
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard

from configs.grafana.generator.files import FOLDER, rendered
from configs.grafana.generator.layout import COLUMNS
from server.metrics.families import FAMILIES
from tests.monitoring.boards import BOARDS, SOURCE, checked_in
from tests.monitoring.dashboards import targets
from tests.monitoring.selectors import names_in

VARIABLES = ["datasource", "job", "instance", "family", "model"]
# Said by logs and by the operating system's own exporter, or only of use in a query of one's own.
NOT_SHOWN = {
    "linker_build_info", "process_virtual_memory_bytes", "process_start_time_seconds",
    "process_open_fds", "process_max_fds",
}  # fmt: skip

each_board = pytest.mark.parametrize("name", BOARDS)


def test_files_are_what_the_code_writes() -> None:
    assert checked_in(FOLDER) == rendered(), "run `make dashboards`"


def test_text_is_the_same_each_time() -> None:
    assert rendered() == rendered()


def test_dashboards_have_names_of_their_own_and_lead_to_each_other() -> None:
    boards = BOARDS.values()
    assert set(BOARDS) == {"savings", "serving", "weights"}
    for key in ("uid", "title"):
        assert len({board[key] for board in boards}) == len(BOARDS)
    [tags] = {tuple(board["tags"]) for board in boards}
    for board in boards:
        [link] = board["links"]
        assert (link["type"], tuple(link["tags"])) == ("dashboards", tags)
        assert link["includeVars"]
        assert link["keepTime"]


@each_board
def test_dashboard_says_nothing_that_its_schema_does_not_know(name: str) -> None:
    plugins.register_default_plugins()
    board = BOARDS[name]
    [alerts] = board["annotations"]["list"]
    known = json.loads(json.dumps(dashboard.Dashboard.from_json(board), cls=JSONEncoder))
    titles = {"titleFormat", "textFormat", "tagKeys"}  # which the data source reads
    for key in titles:
        known["annotations"]["list"][0][key] = alerts[key]
    for panel in known["panels"]:
        if panel["type"] != "row" and panel["fieldConfig"]["defaults"].get("custom") == {}:
            del panel["fieldConfig"]["defaults"]["custom"]
    assert known == board
    assert board["schemaVersion"] == 41


@each_board
def test_variables_narrow_each_other_down_in_order(name: str) -> None:
    source, *labels = BOARDS[name]["templating"]["list"]
    assert [variable["name"] for variable in (source, *labels)] == VARIABLES
    assert (source["type"], source["query"]) == ("datasource", "prometheus")
    for place, variable in enumerate(labels, start=1):
        query = variable["query"]["query"]
        match = re.fullmatch(r"label_values\((\w+)(?:\{(.*)\})?,(\w+)\)", query)
        assert match is not None, query
        family, scope, label = match.groups(default="")
        assert label == variable["name"]
        assert {*FAMILIES[family].labels, "job", "instance"} >= set(VARIABLES[1 : place + 1])
        assert scope == ",".join(f'{before}=~"${before}"' for before in VARIABLES[1:place])
        assert variable["datasource"] == SOURCE
        assert variable["multi"]
        assert variable["includeAll"]
        assert variable["current"]["value"] == ["$__all"]


@each_board
def test_panels_fill_the_grid_without_overlaps(name: str) -> None:
    panels = BOARDS[name]["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = Counter[tuple[int, int]]()
    for panel in panels:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            taken.update((x, y) for y in range(place["y"], place["y"] + place["h"]))
    assert set(taken.values()) == {1}
    height = max(y for _, y in taken) + 1
    assert set(taken) == {(x, y) for x in range(COLUMNS) for y in range(height)}


@each_board
def test_dashboard_begins_with_a_row_of_figures(name: str) -> None:
    panels = BOARDS[name]["panels"]
    assert [panel["type"] for panel in panels[:7]] == [*["stat"] * 6, "row"]
    titles = [panel["title"] for panel in panels]
    assert all(len(title) > 2 for title in titles)
    assert all(first != second for first, second in pairwise(sorted(titles)))


def test_every_family_of_metrics_is_shown() -> None:
    shown = {name for target in targets() for name in names_in(target.expr)}
    shown |= {name for target in targets() for name in re.findall(r"process_\w+", target.expr)}
    missing = {name for name, family in FAMILIES.items() if not shown & set(family.samples)}
    assert missing == NOT_SHOWN
