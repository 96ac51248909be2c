"""The dashboards as Grafana reads them, and the words that panels know series by."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from configs.grafana.generator.files import FOLDER

Json = dict[str, Any]
SOURCE = {"type": "prometheus", "uid": "${datasource}"}  # whichever is chosen
BOARDS: dict[str, Json] = {
    file.stem: json.loads(file.read_text("utf-8")) for file in sorted(FOLDER.glob("*.json"))
}


class Panel(NamedTuple):
    """A panel that shows something."""

    board: str
    json: Json

    def __str__(self) -> str:
        return f"{self.board}-{self.json['title']}"

    def transformations(self, kind: str) -> Iterator[Json]:
        """Yields the options of its transformations of a kind."""
        for transformation in self.json.get("transformations", []):
            if transformation["id"] == kind:
                yield transformation["options"]

    def overridden(self) -> Iterator[str]:
        """Yields the names of fields that are shown in another way than the rest."""
        for override in self.json["fieldConfig"]["overrides"]:
            assert override["matcher"]["id"] == "byName"
            yield override["matcher"]["options"]

    def names(self) -> set[str]:
        """Returns what its fields are called: by legends without labels, and once renamed."""
        legends = {target["legendFormat"] for target in self.json["targets"]}
        renamed = [options["renameByName"] for options in self.transformations("organize")]
        return legends | {new for names in renamed for new in names.values()}

    def grouped_by(self) -> set[str]:
        """Returns every label that one of its expressions aggregates by."""
        labels = [
            label.strip()
            for target in self.json["targets"]
            for inside in re.findall(r"\bby \(([^)]*)\)", target["expr"])
            for label in inside.split(",")
        ]
        return set(labels)


PANELS = [
    Panel(name, panel)
    for name, board in BOARDS.items()
    for panel in board["panels"]
    if panel["type"] != "row"
]


def checked_in(folder: Path) -> dict[str, str]:
    """Returns the text of every file in a folder by its name."""
    return {file.name: file.read_text("utf-8") for file in folder.iterdir()}
