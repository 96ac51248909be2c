"""Figures of changed scores."""

from __future__ import annotations

from typing import Any

from analysis.drawing import Shape
from server.cli.analyze.score_drawings import metric_drawings

PERPLEXITY = {"percent": -10.0, "low": -12.0, "high": -8.0}
DIVERGED = {"percent": None, "low": None, "high": None}
ACCURACY = {"points": 2.0, "stderr": 0.5}


def test_each_metric_has_a_figure_with_the_intervals_of_its_changes() -> None:
    rows: dict[str, list[dict[str, Any] | None]] = {
        "kernel": [
            {"instruct_record": PERPLEXITY, "mmlu": ACCURACY},
            {"instruct_record": DIVERGED},
        ],
        "uniform": [None, {"instruct_record": PERPLEXITY}],
    }
    perplexity, accuracy = metric_drawings(
        rows, x=[0.5, 1], x_title="scale", shape=Shape.CURVES, what="Changes"
    )
    assert perplexity.series == {"kernel": [-10.0, None], "uniform": [None, -10.0]}
    assert perplexity.intervals == {"kernel": [(-12.0, -8.0), None], "uniform": [None, (-12, -8)]}
    assert "95% interval" in perplexity.caption
    assert perplexity.y_title.endswith("change in %")
    assert accuracy.series == {"kernel": [2.0, None], "uniform": [None, None]}
    assert accuracy.intervals["kernel"] == [(1.5, 2.5), None]
    assert "one standard error" in accuracy.caption
    assert accuracy.y_title.endswith("change in points")


def test_nothing_measured_has_no_figure() -> None:
    assert metric_drawings({}, x=[], x_title="", shape=Shape.BARS, what="Changes") == []
