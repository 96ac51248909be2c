"""What `linker analyze kernel` finds: the document, and the tables and figures that show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from analysis.drawing import Drawing
from server.cli.analyze.output import Shown


@dataclass(slots=True, kw_only=True)
class Found:
    """All of it; grows while kernels are measured."""

    document: dict[str, Any]
    tables: list[Shown]
    drawings: list[Drawing]
    notes: list[str]


class Part(NamedTuple):
    """What was measured of some kernels."""

    place: str  # in the document
    record: Mapping[str, Any]
    tables: Sequence[Shown]
    drawings: Sequence[Drawing]

    def join(self, found: Found) -> None:
        """Adds it to all that was found."""
        found.document[self.place] = found.document.get(self.place, {}) | dict(self.record)
        found.tables += self.tables
        found.drawings += self.drawings
