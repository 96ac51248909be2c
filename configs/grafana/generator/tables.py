"""Panels of what is there now, by model, by block and by what else a series says."""

from __future__ import annotations

from collections.abc import Sequence

from grafana_foundation_sdk.builders import barchart, table, trend
from grafana_foundation_sdk.models.common import (
    FieldTextAlignment,
    GraphDrawStyle,
    StackingMode,
    TableCellBackgroundDisplayMode,
    TableCellHeight,
    TableColoredBackgroundCellOptions,
    VisibilityMode,
    VizOrientation,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from configs.grafana.generator.charts import targets
from configs.grafana.generator.frames import corner, joined, matrix, numeric
from configs.grafana.generator.queries import Query
from configs.grafana.generator.style import (
    NONE,
    UNSEEN,
    blank,
    by_threshold,
    legend,
    plain_number,
    setting,
    tooltip,
)


def cells(title: str, what: str, unit: str, query: Query) -> table.Panel:
    """Returns a heat map of a query by `model` and `block`, coloured by thresholds or mappings."""
    panel = by_model(title, what, unit, query, label="block").min_width(44)
    return panel.transformations([*numeric("block"), *matrix("model", "block")])


def by_model(title: str, what: str, unit: str, query: Query, *, label: str) -> table.Panel:
    """Returns a line for every model with a cell for every value of a label, coloured likewise."""
    background = TableColoredBackgroundCellOptions(mode=TableCellBackgroundDisplayMode.BASIC)
    return (
        table.Panel()
        .title(title)
        .description(what)
        .unit(unit)
        .no_value(NONE)
        .mappings([blank()])
        .targets(targets([query], instant=True, form=PromQueryFormat.TABLE))
        .transformations(matrix("model", label))
        .cell_options(background)
        .cell_height(TableCellHeight.SM)
        .align(FieldTextAlignment.CENTER)
        .color_scheme(by_threshold())
        .override_by_name(
            "model",
            [
                setting("custom.cellOptions", {"type": "auto"}),
                setting("custom.minWidth", 160),
                setting("custom.align", "left"),
            ],
        )
    )


def listed(title: str, what: str, columns: Sequence[Query]) -> table.Panel:
    """Returns a line for every model, with the values that queries have for it."""
    return (
        table.Panel()
        .title(title)
        .description(what)
        .unit("bytes")
        .no_value(NONE)
        .targets(targets(columns, instant=True, form=PromQueryFormat.TABLE))
        .transformations(joined("model", [query.legend for query in columns]))
        .cell_height(TableCellHeight.SM)
        .min_width(90)
        .override_by_name("family", [setting("custom.minWidth", 120)])
    )


def profile(title: str, what: str, unit: str, query: Query) -> trend.Panel:
    """Returns a query by `model` and `block` as a line for every model along its blocks."""
    return (
        trend.Panel()
        .title(title)
        .description(what)
        .unit(unit)
        .no_value(UNSEEN)
        .targets(targets([query], instant=True, form=PromQueryFormat.TABLE))
        .transformations([*numeric("block"), *matrix("block", "model")])
        .x_field(corner("block", "model"))
        .draw_style(GraphDrawStyle.LINE)
        .line_width(2)
        .show_points(VisibilityMode.ALWAYS)
        .point_size(5)
        .legend(legend())
        .tooltip(tooltip())
        .override_by_name("block", plain_number("block"))
    )


def bars(title: str, what: str, unit: str, query: Query, *, label: str) -> barchart.Panel:
    """Returns a bar for every model, made of the values that a query has by `label`."""
    return (
        _bars(title, what, unit)
        .targets(targets([query], instant=True, form=PromQueryFormat.TABLE))
        .x_field(corner("model", label))
        .transformations(matrix("model", label))
        .stacking(StackingMode.NORMAL)
    )


def beside(title: str, what: str, unit: str, *queries: Query, by: str = "model") -> barchart.Panel:
    """Returns a bar for every query beside each other, for every value of the label `by`."""
    return (
        _bars(title, what, unit)
        .targets(targets(queries, instant=True, form=PromQueryFormat.TABLE))
        .transformations(joined(by, [query.legend for query in queries]))
        .x_field(by)
        .stacking(StackingMode.NONE)
    )


def _bars(title: str, what: str, unit: str) -> barchart.Panel:
    return (
        barchart.Panel()
        .title(title)
        .description(what)
        .unit(unit)
        .min(0)
        .no_value(UNSEEN)
        .orientation(VizOrientation.HORIZONTAL)
        .show_value(VisibilityMode.NEVER)
        .bar_width(0.9)
        .group_width(0.8)
        .fill_opacity(80)
        .line_width(1)
        .x_tick_label_max_length(40)
        .legend(legend())
        .tooltip(tooltip())
    )
