"""What dashboards ask Prometheus for, with their variables filled in as Grafana does it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tests.monitoring.prometheus import Prometheus
from tests.monitoring.promtool import PROJECT

FOLDER = PROJECT / "configs/grafana/dashboards"
FILES = sorted(FOLDER.glob("*.json"))
_STEP = "5s"  # of an hour on a wide screen, scraped as often
# What Grafana puts in for it, and for a step of a minute: four scrapes, or a step and one more.
_BUILT_IN = {
    _STEP: {"__interval": _STEP, "__rate_interval": "20s", "__range": "1h"},
    "1m": {"__interval": "1m", "__rate_interval": "65s", "__range": "1h"},
}
_VARIABLE = re.compile(r"\$(?:\{(?P<braced>\w+)(?::\w+)?\}|(?P<plain>\w+))")
_LABEL_VALUES = re.compile(r"label_values\((?:(?P<selector>.+),\s*)?(?P<label>\w+)\)")
_REGEX_CHARACTERS = re.compile(r"[\\^$.*+?()[\]{}|]")


class Target(NamedTuple):
    """One query of a panel."""

    dashboard: str
    panel: str
    expr: str
    instant: bool
    step: str = _STEP  # that of the panel, if it has one of its own

    def __str__(self) -> str:
        return f"{self.dashboard}: {self.panel}"


def targets() -> Iterator[Target]:
    """Yields every query of every dashboard."""
    for file in FILES:
        board = json.loads(file.read_text())
        for panel in _panels(board):
            for target in panel.get("targets", []):
                instant = bool(target.get("instant"))
                step = panel.get("interval") or _STEP
                yield Target(board["title"], panel["title"], target["expr"], instant, step)
        for annotation in board.get("annotations", {}).get("list", []):
            if "expr" in annotation:
                yield Target(board["title"], annotation["name"], annotation["expr"], False)


class Variable(NamedTuple):
    """A choice that a dashboard offers of what Prometheus has."""

    dashboard: str
    name: str
    query: str
    everything: str | None  # what "All" stands for; None: all there are, one by one

    def __str__(self) -> str:
        return f"{self.dashboard}: {self.name}"


def variables() -> Iterator[Variable]:
    """Yields every variable that asks Prometheus."""
    for file in FILES:
        board = json.loads(file.read_text())
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                query = variable["query"]["query"]
                yield Variable(board["title"], variable["name"], query, variable.get("allValue"))


def values_of(prometheus: Prometheus, query: str, chosen: Mapping[str, str]) -> list[str]:
    """Returns what a variable offers to choose from."""
    match = _LABEL_VALUES.fullmatch(filled_in(query, chosen))
    assert match is not None, query
    return prometheus.label_values(match["label"], of=match["selector"])


def chosen_all(prometheus: Prometheus, board: str, *, singly: bool = False) -> dict[str, str]:
    """Returns the text of every variable of a dashboard, each with all its values chosen.

    They are chosen as "All", or `singly`, one after the other.
    """
    chosen: dict[str, str] = {}
    for variable in variables():
        if variable.dashboard == board:
            offered = as_regex(values_of(prometheus, variable.query, chosen))
            chosen[variable.name] = offered if singly else variable.everything or offered
    return chosen


def as_regex(values: list[str]) -> str:
    """Returns a choice of several values as Grafana writes it into a PromQL string."""
    escaped = [_REGEX_CHARACTERS.sub(r"\\\\\g<0>", value) for value in values]
    return escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"


def filled_in(expression: str, chosen: Mapping[str, str], *, step: str = _STEP) -> str:
    """Returns an expression with its variables' values; every one has to be known."""
    known = {**_BUILT_IN[step], **chosen}
    return _VARIABLE.sub(lambda found: known[found["braced"] or found["plain"]], expression)


def _panels(board: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for panel in board["panels"]:
        yield panel
        yield from panel.get("panels", [])  # of a row that is folded up
