"""What a probe found: one table, a few facts, and how to read them. Knows no way to show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from analysis.drawing import Drawing

Value = str | int | float | bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """A probe's answer; a command prints it as a table or as JSON, a report draws it.

    Attributes:
        title: What was measured, of what.
        columns: Names of the columns, units in them where they have any.
        rows: One value a column; None where there is none.
        facts: Numbers about all rows together: name -> value.
        notes: Method, limits and how to read the numbers, a sentence or two each.
        series: Numbers that are not in the table: name -> values.
        drawings: Figures.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]
    facts: Mapping[str, Value]
    notes: tuple[str, ...] = ()
    series: Mapping[str, Sequence[float]] = field(default_factory=dict)
    drawings: tuple[Drawing, ...] = ()

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON values, each row an object."""
        return {
            "title": self.title,
            "rows": [dict(zip(self.columns, row, strict=True)) for row in self.rows],
            "facts": dict(self.facts),
            "notes": list(self.notes),
            "series": {name: list(values) for name, values in self.series.items()},
        }
