"""Panels with time along them, and single figures. Each obeys the units it is given."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    heatmap,
    prometheus,
    stat,
    statetimeline,
    timeseries,
)
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.variants import Dataquery
from grafana_foundation_sdk.models.common import (
    BarGaugeDisplayMode,
    BarGaugeNamePlacement,
    BigValueColorMode,
    BigValueGraphMode,
    BigValueTextMode,
    GraphDrawStyle,
    StackingMode,
    VisibilityMode,
    VizOrientation,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode, HeatmapColorScale
from grafana_foundation_sdk.models.prometheus import PromQueryFormat, QueryEditorMode

from configs.grafana.generator.queries import Query
from configs.grafana.generator.style import (
    BLUE,
    DATASOURCE,
    UNSEEN,
    by_threshold,
    fixed,
    in_words,
    legend,
    thresholds,
    tooltip,
)


def targets(
    queries: Sequence[Query],
    *,
    instant: bool = False,
    form: PromQueryFormat = PromQueryFormat.TIME_SERIES,
) -> list[Builder[Dataquery]]:
    """Returns the queries of a panel, named by letters from A on."""
    built: list[Builder[Dataquery]] = []
    for name, query in zip(ascii_uppercase, queries, strict=False):
        target = prometheus.Dataquery().ref_id(name).datasource(DATASOURCE)
        target = target.expr(query.expr).format(form).editor_mode(QueryEditorMode.CODE)
        target = target.legend_format(query.legend or "__auto")
        built.append(target.instant() if instant else target.range())
    return built


def tile(title: str, what: str, unit: str, query: Query) -> stat.Panel:
    """Returns one figure with its course behind it."""
    return (
        stat.Panel()
        .title(title)
        .description(what)
        .unit(unit)
        .no_value(UNSEEN)
        .targets(targets([query]))
        .graph_mode(BigValueGraphMode.AREA)
        .color_mode(BigValueColorMode.VALUE)
        .text_mode(BigValueTextMode.VALUE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(False))
        .color_scheme(fixed(BLUE))
        .thresholds(thresholds(BLUE))
    )


def lines(title: str, what: str, unit: str, *queries: Query) -> timeseries.Panel:
    """Returns a line for every series."""
    return (
        timeseries.Panel()
        .title(title)
        .description(what)
        .unit(unit)
        .min(0)
        .no_value(UNSEEN)
        .targets(targets(queries))
        .draw_style(GraphDrawStyle.LINE)
        .line_width(2)
        .fill_opacity(8)
        .show_points(VisibilityMode.AUTO)
        .legend(legend())
        .tooltip(tooltip())
    )


def stacked(title: str, what: str, unit: str, *queries: Query) -> timeseries.Panel:
    """Returns areas on top of each other, which sum up to something."""
    stacking = common.StackingConfig().mode(StackingMode.NORMAL).group("A")
    return lines(title, what, unit, *queries).stacking(stacking).fill_opacity(55).line_width(1)


def events(title: str, what: str, *queries: Query) -> timeseries.Panel:
    """Returns bars of how often something happened in each interval, of a minute at least."""
    stacking = common.StackingConfig().mode(StackingMode.NORMAL).group("A")
    return (
        lines(title, what, "short", *queries)
        .draw_style(GraphDrawStyle.BARS)
        .stacking(stacking)
        .fill_opacity(70)
        .line_width(1)
        .decimals(0)
        .interval("1m")
    )


def gauges(title: str, what: str, unit: str, query: Query) -> bargauge.Panel:
    """Returns a bar for what every series is at now."""
    return (
        bargauge.Panel()
        .title(title)
        .description(what)
        .unit(unit)
        .min(0)
        .no_value(UNSEEN)
        .targets(targets([query], instant=True))
        .orientation(VizOrientation.HORIZONTAL)
        .display_mode(BarGaugeDisplayMode.BASIC)
        .name_placement(BarGaugeNamePlacement.LEFT)
        .show_unfilled(True)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(False))
        .color_scheme(by_threshold())
        .thresholds(thresholds(BLUE))
    )


def distribution(title: str, what: str, unit: str, buckets: str) -> heatmap.Panel:
    """Returns how what a histogram counts is spread, over time. `buckets` keeps the label `le`."""
    color = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Blues")
    return (
        heatmap.Panel()
        .title(title)
        .description(what)
        .unit("short")
        .no_value(UNSEEN)
        .targets(targets([Query(buckets, "{{le}}")], form=PromQueryFormat.HEATMAP))
        .calculate(False)
        .show_value(VisibilityMode.NEVER)
        .color(color.steps(32).exponent(0.5).scale(HeatmapColorScale.EXPONENTIAL))
        .cell_gap(1)
        .filter_values(heatmap.FilterValueRange().le(1e-9))
        .y_axis(heatmap.YAxisConfig().unit(unit))
        .cell_values(heatmap.CellValues().unit("short"))
    )


def states(
    title: str, what: str, words: Sequence[tuple[str, str]], query: Query
) -> statetimeline.Panel:
    """Returns which state every series was in. Its values are places in `words`."""
    return (
        statetimeline.Panel()
        .title(title)
        .description(what)
        .unit("none")
        .no_value(UNSEEN)
        .targets(targets([query]))
        .mappings([in_words(words)])
        .merge_values(True)
        .show_value(VisibilityMode.AUTO)
        .fill_opacity(80)
        .row_height(0.8)
        .legend(legend())
        .tooltip(tooltip())
        .color_scheme(by_threshold())
    )
