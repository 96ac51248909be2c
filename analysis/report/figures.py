"""The report's figures, drawn by Plotly; colours of text and paper are the page's.

Legend: N fine-tunes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import plotly.graph_objects as go

from analysis.drawing import Drawing, Shape
from analysis.selection import Component

# Okabe and Ito's colours, which people tell apart who see fewer.
PALETTE: Final = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999")
_NULL: Final = "#D55E00"
_GROUPS: Final = {"attention": "#0072B2", "MLP": "#E69F00", "all": "#009E73"}  # of components
_HEIGHT: Final = 360

Numbers = Sequence[float | None]
Intervals = Sequence[Sequence[float] | None]


def shares_by_component(
    components: Mapping[str, Mapping[str, Any]], *, kind: str
) -> dict[str, Any]:
    """PC1's share of each component with its interval, and its null beside it."""
    names = list(components)
    figure = go.Figure()
    for group, colour in _GROUPS.items():
        if not (found := [name for name in names if _group(name) == group]):
            continue
        values = [components[name][f"pc1{kind}"] for name in found]
        reach = _reach(values, [components[name][f"interval{kind}"] for name in found])
        figure.add_bar(x=found, y=values, error_y=reach, marker={"color": colour}, name=group)
    figure.add_scatter(
        x=names,
        y=[components[name][f"null95{kind}"] for name in names],
        mode="markers",
        # Of a length that keeps neighbours apart also on a phone.
        marker={"symbol": "line-ew-open", "size": 12, "color": _NULL, "line": {"width": 3}},
        name="null, 95th percentile",
    )
    figure.update_layout(barmode="overlay")
    figure.update_xaxes(categoryorder="array", categoryarray=names)
    return _spec(figure, y="PC1's share", percent=True)


def curves(
    x: Sequence[Any],
    series: Mapping[str, Numbers],
    *,
    x_title: str,
    y_title: str,
    intervals: Mapping[str, Intervals] | None = None,
    dotted: Mapping[str, Numbers] | None = None,
    percent: bool = False,
) -> dict[str, Any]:
    """One line for each name, with the intervals of its points, and dotted ones to compare with."""
    figure = go.Figure()
    for number, (name, values) in enumerate(series.items()):
        reach = _reach_of(name, values, intervals)
        line = {"color": PALETTE[number % len(PALETTE)]}
        figure.add_scatter(
            x=list(x), y=list(values), mode="lines+markers", name=name, error_y=reach, line=line
        )
    for name, values in (dotted or {}).items():
        line = {"color": _NULL, "dash": "dot"}
        figure.add_scatter(x=list(x), y=list(values), mode="lines", name=name, line=line)
    return _spec(figure, x=x_title, y=y_title, percent=percent, named=_are_names(x))


def bars(
    x: Sequence[Any],
    series: Mapping[str, Numbers],
    *,
    x_title: str,
    y_title: str,
    intervals: Mapping[str, Intervals] | None = None,
    stacked: bool = False,
    line_at: float | None = None,
    percent: bool = False,
) -> dict[str, Any]:
    """Bars beside or on top of each other, with a line at a height that means something."""
    figure = go.Figure()
    for number, (name, values) in enumerate(series.items()):
        colour = PALETTE[number % len(PALETTE)]
        reach = _reach_of(name, values, intervals)
        figure.add_bar(
            x=list(x), y=list(values), name=name, error_y=reach, marker={"color": colour}
        )
    if line_at is not None:
        figure.add_hline(y=line_at, line={"color": _NULL, "dash": "dot"})
    figure.update_layout(barmode="stack" if stacked else "group")
    return _spec(figure, x=x_title, y=y_title, percent=percent, named=_are_names(x))


def drawn(drawing: Drawing) -> dict[str, Any]:
    """What a study has drawn up."""
    return (curves if drawing.shape is Shape.CURVES else bars)(
        drawing.x,
        drawing.series,
        x_title=drawing.x_title,
        y_title=drawing.y_title,
        intervals=drawing.intervals,
    )


def spreads(series: Mapping[str, Numbers], *, y_title: str, line_at: float) -> dict[str, Any]:
    """Where the values of each name lie: a box over them, and every one as a point."""
    figure = go.Figure()
    for number, (name, values) in enumerate(series.items()):
        figure.add_box(
            y=[value for value in values if value is not None],
            name=name,
            boxpoints="all",
            jitter=0.5,
            pointpos=0,
            marker={"size": 4, "color": PALETTE[number % len(PALETTE)]},
        )
    figure.add_hline(y=line_at, line={"color": _NULL, "dash": "dot"})
    figure.update_layout(showlegend=False)
    return _spec(figure, y=y_title)


def heat_map(names: Sequence[str], values_NN: Sequence[Numbers]) -> dict[str, Any]:
    """Cosines of every pair, from -1 to 1, with the numbers in their cells."""
    figure = go.Figure(
        go.Heatmap(
            x=list(names),
            y=list(names),
            z=[list(row) for row in values_NN],
            zmin=-1,
            zmax=1,
            colorscale="RdBu",
            reversescale=True,
            texttemplate="%{z:.3f}",
            colorbar={"title": {"text": "cos"}},
        )
    )
    figure.update_yaxes(autorange="reversed")
    return _spec(figure)


def _spec(
    figure: Any,
    *,
    x: str | None = None,
    y: str | None = None,
    percent: bool = False,
    named: bool = False,
) -> dict[str, Any]:
    figure.update_layout(
        height=_HEIGHT,
        margin={"l": 60, "r": 20, "t": 20, "b": 60},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        template=None,
    )
    # Left to itself, Plotly takes a model that is called like a date or a number for one.
    figure.update_xaxes(title_text=x, type="category" if named else None)
    figure.update_yaxes(title_text=y, tickformat="~%" if percent else None)
    spec: dict[str, Any] = figure.to_plotly_json()
    return {"data": spec["data"], "layout": spec["layout"]}


def _are_names(x: Sequence[Any]) -> bool:
    return any(isinstance(place, str) for place in x)


def _reach_of(
    name: str, values: Numbers, intervals: Mapping[str, Intervals] | None
) -> dict[str, Any] | None:
    """Returns error bars, or None for a series without any: no interval is not one of length 0."""
    found = (intervals or {}).get(name, ())
    return _reach(values, found) if any(ends is not None for ends in found) else None


def _reach(values: Numbers, intervals: Intervals) -> dict[str, Any]:
    """Returns error bars from the ends of intervals."""
    pairs = [
        (0.0, 0.0) if value is None or ends is None else (ends[1] - value, value - ends[0])
        for value, ends in zip(values, intervals, strict=True)
    ]
    up, down = zip(*pairs, strict=True) if pairs else ((), ())
    return {
        "type": "data",
        "symmetric": False,
        # A mean of intervals can end on the wrong side of a mean by rounding alone.
        "array": [max(0.0, length) for length in up],
        "arrayminus": [max(0.0, length) for length in down],
    }


def _group(component: str) -> str:
    if component in ("attention", "all"):
        return component
    is_attention = component != "mlp" and Component(component).is_attention
    return "attention" if is_attention else "MLP"
