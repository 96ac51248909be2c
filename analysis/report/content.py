"""What a report is made of: sections of sentences, figures and tables. Knows no HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Cell = str | float | int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Numbers, with how they were made."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    folded: bool = False  # shown when it is asked for, and in print


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A drawing, as Plotly's JSON."""

    caption: str  # what it shows, and how its numbers and intervals were made
    label: str  # for those who cannot see it
    spec: Mapping[str, Any]  # data and layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the report."""

    heading: str
    sentences: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()


def text_of(cell: Cell) -> str:
    """Returns a cell's text: four digits of a number, a dash where there is none."""
    if cell is None or (isinstance(cell, float) and not math.isfinite(cell)):
        return "-"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def between(interval: Sequence[float] | None) -> str | None:
    """Returns an interval's text."""
    return None if interval is None else f"{interval[0]:.3g} to {interval[1]:.3g}"


def percent(share: float | None) -> str | None:
    """Returns a share's text."""
    return None if share is None else f"{100 * share:.1f} %"


def percents(interval: Sequence[float] | None) -> str | None:
    """Returns an interval of shares as text."""
    return None if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"
