"""How changes of scores are drawn: a figure for each metric, with the intervals of its changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from analysis.drawing import Drawing, Shape
from analysis.evaluation.token_loss import LEVEL
from server.cli.analyze.scores import METRICS

Change = Mapping[str, Any] | None  # of `analysis.evaluation.sweep.changes`; None: not measured
_PERCENT = f"Whiskers: {LEVEL:.0%} interval, from windows or records in pairs."
_POINTS = "Whiskers: one standard error, paired by question."


def metric_drawings(
    rows: Mapping[str, Sequence[Mapping[str, Any] | None]],
    *,
    x: Sequence[str | float],
    x_title: str,
    shape: Shape,
    what: str,
) -> list[Drawing]:
    """Returns a figure for each metric that any of the rows has.

    Args:
        rows: Name of a series -> metric -> change, at every place of `x`; None: not measured.
        x: Names or numbers.
        x_title: What they are.
        shape: Of the figures.
        what: Is changed, for the captions.
    """
    measured = [row for series in rows.values() for row in series if row is not None]
    return [
        change_drawing(
            {name: [row and row.get(metric) for row in series] for name, series in rows.items()},
            x=x,
            x_title=x_title,
            y_title=METRICS[metric],
            shape=shape,
            what=f"{what}: {METRICS[metric]}",
        )
        for metric in METRICS
        if any(metric in row for row in measured)
    ]


def change_drawing(
    series: Mapping[str, Sequence[Change]],
    *,
    x: Sequence[str | float],
    x_title: str,
    y_title: str,
    shape: Shape,
    what: str,
) -> Drawing:
    """Returns one figure; changes of a model that diverged are left out."""
    points = any(one is not None and "points" in one for each in series.values() for one in each)
    unit = "change in points" if points else "change in %"
    return Drawing(
        caption=f"{what}. {_POINTS if points else _PERCENT} What diverged is not drawn.",
        shape=shape,
        x_title=x_title,
        y_title=f"{y_title}, {unit}",
        x=x,
        series={name: [_value(change) for change in each] for name, each in series.items()},
        intervals={name: [_ends(change) for change in each] for name, each in series.items()},
    )


def _value(change: Change) -> float | None:
    if change is None:
        return None
    value: float | None = change.get("points", change.get("percent"))
    return value


def _ends(change: Change) -> tuple[float, float] | None:
    if change is None:
        return None
    if "points" not in change:
        low, high = change["low"], change["high"]
        return None if low is None or high is None else (low, high)
    points, error = change["points"], change["stderr"]
    return None if points is None or error is None else (points - error, points + error)
