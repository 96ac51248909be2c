"""Panels with a number of variants along them."""

from __future__ import annotations

from collections.abc import Mapping

from grafana_foundation_sdk.builders import common, trend, xychart
from grafana_foundation_sdk.models.common import (
    GraphDrawStyle,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from grafana_foundation_sdk.models.xychart import SeriesMapping, XYShowMode

from configs.grafana.generator.charts import targets
from configs.grafana.generator.frames import in_time, joined, numeric
from configs.grafana.generator.queries import Query
from configs.grafana.generator.style import (
    UNSEEN,
    colored,
    legend,
    plain_number,
    setting,
    tooltip,
)


def over_number(
    title: str, what: str, *, series: Mapping[str, tuple[str, str]], ratio: tuple[str, Query]
) -> trend.Panel:
    """Returns bytes against a number of variants, and a ratio on an axis of its own.

    Args:
        title: Of the panel.
        what: Its description.
        series: By name, an expression that has the label `N`, and its colour.
        ratio: Its colour, and such an expression with its name.
    """
    color, share = ratio
    queries = [Query(expr, name) for name, (expr, _) in series.items()]
    panel = (
        trend.Panel()
        .title(title)
        .description(what)
        .unit("bytes")
        .min(0)
        .no_value("Two resident variants of a family say what a third would cost")
        .targets(targets([*queries, share], instant=True, form=PromQueryFormat.TABLE))
        .transformations([*numeric("N"), *joined("N", [*series, share.legend])])
        .x_field("N")
        .draw_style(GraphDrawStyle.LINE)
        .line_width(2)
        .show_points(VisibilityMode.ALWAYS)
        .point_size(8)
        .legend(legend())
        .tooltip(tooltip())
        .override_by_name("N", plain_number("variants"))
        .override_by_name(
            share.legend,
            [
                colored(color),
                setting("unit", "percentunit"),
                setting("max", 1),
                setting("custom.axisPlacement", "right"),
                setting("custom.lineStyle", {"fill": "dash", "dash": [6, 6]}),
            ],
        )
    )
    for name, (_, shade) in series.items():
        panel = panel.override_by_name(name, [colored(shade)])
    return panel


def as_it_was(
    title: str, what: str, *, along: Query, series: Mapping[str, tuple[str, str]]
) -> xychart.Panel:
    """Returns bytes against a number, a point for every moment of the time shown.

    Args:
        title: Of the panel.
        what: Its description.
        along: What lies along the chart.
        series: By name, an expression and its colour.
    """
    queries = [along, *(Query(expr, name) for name, (expr, _) in series.items())]
    panel = (
        xychart.Panel()
        .title(title)
        .description(what)
        .unit("bytes")
        .min(0)
        .no_value(UNSEEN)
        .targets(targets(queries))
        .transformations(in_time())
        .mapping(SeriesMapping.MANUAL)
        .show(XYShowMode.POINTS)
        .point_size(xychart.XychartFieldConfigPointSize().fixed(7))
        .fill_opacity(60)
        .legend(legend())
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.SINGLE))
        .series([_along(along.legend, name) for name in series])
        .override_by_name(along.legend, plain_number(along.legend))
    )
    for name, (_, shade) in series.items():
        panel = panel.override_by_name(name, [colored(shade)])
    return panel


def _along(x: str, y: str) -> xychart.XYSeriesConfig:
    only = xychart.MatcherConfig().id("byIndex").options(0)
    across = xychart.MatcherConfig().id("byName").options(x)
    up = xychart.MatcherConfig().id("byName").options(y)
    return (
        xychart.XYSeriesConfig()
        .name(xychart.XychartXYSeriesConfigName().fixed(y))
        .frame(xychart.XychartXYSeriesConfigFrame().matcher(only))
        .x(xychart.XychartXYSeriesConfigX().matcher(across))
        .y(xychart.XychartXYSeriesConfigY().matcher(up))
    )
