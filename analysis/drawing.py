"""A figure as plain data: curves or bars over one axis, and how sure their points are.

What a study draws, before any library does it; knows none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

Numbers = Sequence[float | None]
Intervals = Sequence[tuple[float, float] | None]


class Shape(StrEnum):
    """What the points of a series are joined to."""

    CURVES = "curves"
    BARS = "bars"


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """One figure.

    Attributes:
        caption: What it shows, and how its numbers and intervals were made.
        shape: Of all series.
        x_title: What the axis across holds, with its unit.
        y_title: The same of the axis upwards.
        x: Places on the axis across, numbers or names.
        series: Name -> a value for each place, None where there is none.
        intervals: Name of some of the series -> low and high of each value that has them.
    """

    caption: str
    shape: Shape
    x_title: str
    y_title: str
    x: Sequence[str | float]
    series: Mapping[str, Numbers]
    intervals: Mapping[str, Intervals] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert all(len(values) == len(self.x) for values in self.series.values())
        assert all(len(ends) == len(self.x) for ends in self.intervals.values())
        assert self.intervals.keys() <= self.series.keys()

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        return {
            "caption": self.caption,
            "shape": self.shape.value,
            "x_title": self.x_title,
            "y_title": self.y_title,
            "x": list(self.x),
            "series": {name: list(values) for name, values in self.series.items()},
            "intervals": {
                name: [None if one is None else list(one) for one in ends]
                for name, ends in self.intervals.items()
            },
        }
