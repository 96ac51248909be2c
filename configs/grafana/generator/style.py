"""What all panels have in common: colours, thresholds, and how a field is overridden."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from grafana_foundation_sdk.builders import common, dashboard
from grafana_foundation_sdk.models.common import (
    LegendDisplayMode,
    LegendPlacement,
    SortOrder,
    TooltipDisplayMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardSpecialValueMapOptions,
    DataSourceRef,
    DynamicConfigValue,
    FieldColorModeId,
    SpecialValueMap,
    SpecialValueMatch,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMappingResult,
)

DATASOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
GREEN, YELLOW, ORANGE, RED = "green", "yellow", "orange", "red"
BLUE, PURPLE, GREY = "blue", "purple", "#8e8e8e"
RUNGS = {"alias": GREEN, "residual": YELLOW, "own": RED}
# From light to dark: legible on both themes, and in shades of grey.
SEQUENCE = ("#dbe9f6", "#bad6eb", "#89bedc", "#539ecd", "#2b7bba", "#e6550d", "#a50f15")
UNSEEN = "nothing yet"
NONE = "-"  # in a cell


def fixed(color: str) -> dashboard.FieldColor:
    """Returns one colour for a whole field."""
    return dashboard.FieldColor().mode(FieldColorModeId.FIXED).fixed_color(color)


def by_threshold() -> dashboard.FieldColor:
    """Returns the colour of the threshold that a value has reached."""
    return dashboard.FieldColor().mode(FieldColorModeId.THRESHOLDS)


def thresholds(base: str, *steps: tuple[float, str]) -> dashboard.ThresholdsConfig:
    """Returns colours by what a value has reached, `base` below all."""
    levels = [Threshold(value=None, color=base)]
    levels += [Threshold(value=value, color=color) for value, color in steps]
    return dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(levels)


def setting(name: str, value: object) -> DynamicConfigValue:
    """Returns a property of an override."""
    return DynamicConfigValue(id_val=name, value=value)


def colored(color: str) -> DynamicConfigValue:
    """Returns an override of the colour."""
    return setting("color", {"mode": "fixed", "fixedColor": color})


def plain_number(axis: str | None = None) -> list[DynamicConfigValue]:
    """Returns overrides for a whole number without a unit, and the name of its axis."""
    label = [] if axis is None else [setting("custom.axisLabel", axis)]
    return [setting("unit", "none"), setting("decimals", 0), *label]


def in_words(words: Sequence[tuple[str, str]]) -> ValueMap:
    """Returns what 0, 1, 2 … are shown as, and in which colours."""
    results: Mapping[str, ValueMappingResult] = {
        str(value): ValueMappingResult(text=text, color=color, index=value)
        for value, (text, color) in enumerate(words)
    }
    return ValueMap(options=dict(results))


def blank() -> SpecialValueMap:
    """Returns how a cell without a value looks."""
    shown = ValueMappingResult(text=NONE, color="transparent", index=100)
    empty = DashboardSpecialValueMapOptions(match=SpecialValueMatch.NULL_AND_NAN, result=shown)
    return SpecialValueMap(options=empty)


def legend() -> common.VizLegendOptions:
    """Returns a list below the chart."""
    options = common.VizLegendOptions().show_legend(True)
    return options.display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)


def tooltip() -> common.VizTooltipOptions:
    """Returns one that lists all series, the largest first."""
    options = common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI)
    return options.sort(SortOrder.DESCENDING)
