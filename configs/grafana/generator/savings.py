"""The dashboard *Savings*: what sharing saves, and what it costs each variant."""

from __future__ import annotations

from grafana_foundation_sdk.builders import timeseries, trend, xychart
from grafana_foundation_sdk.models.dashboard import Dashboard

from configs.grafana.generator import tiles
from configs.grafana.generator.blocks import blocks
from configs.grafana.generator.charts import stacked
from configs.grafana.generator.fidelity import fidelity, variants
from configs.grafana.generator.layout import Band, Section, laid_out
from configs.grafana.generator.numbers import as_it_was, over_number
from configs.grafana.generator.onboarding import onboarding
from configs.grafana.generator.queries import MEMBER, Query
from configs.grafana.generator.savings_queries import (
    COPIES,
    HELD,
    PROJECTED,
    PROJECTED_COPIES,
    PROJECTED_RATIO,
    RESIDENT,
    TWINS,
)
from configs.grafana.generator.style import BLUE, GREEN, GREY, ORANGE, colored, setting


def savings() -> Dashboard:
    """Returns the dashboard."""
    figures = (
        tiles.saved_bytes(),
        tiles.saved_ratio(),
        tiles.resident_variants(),
        tiles.tokens_per_second(),
        tiles.first_token(),
        tiles.inter_token(),
    )
    memory = (
        Band(height=10, widths=(24,), panels=(_memory(),)),
        Band(height=10, widths=(12, 12), panels=(_projection(), _trace())),
    )
    sections = (
        Section(title=None, bands=(Band(height=4, widths=(4,) * 6, panels=figures),)),
        Section(title="Memory", bands=memory),
        variants(),
        blocks(),
        fidelity(),
        onboarding(),
    )
    what = "What sharing blocks between variants saves, and what it costs each of them."
    return laid_out("linker-savings", "LinkerLLM / Savings", what, sections)


def _memory() -> timeseries.Panel:
    unique = f'sum by (model) (linker_model_weight_bytes{{{MEMBER},kind="unique"}})'
    copies = f'sum(linker_model_weight_bytes{{{MEMBER},kind="logical"}})'
    what = (
        "What only each model holds, stacked: the donor all of its weights, a variant what it does "
        "not share. The dashed line is what separate copies of the same models would take. Twins "
        "are unshared copies that were loaded to compare with."
    )
    panel = stacked(
        "Memory by variant",
        what,
        "bytes",
        Query(unique, "{{model}}"),
        Query(TWINS, "unshared twins"),
        Query(copies, "separate copies"),
    )
    line = [
        setting("custom.stacking", {"mode": "none", "group": "B"}),
        setting("custom.lineStyle", {"fill": "dash", "dash": [10, 8]}),
        setting("custom.fillOpacity", 0),
        setting("custom.lineWidth", 2),
        colored(ORANGE),
    ]
    panel = panel.override_by_name("separate copies", line)
    return panel.override_by_name("unshared twins", [colored(GREY)])


def _projection() -> trend.Panel:
    what = (
        "What N variants of each chosen family would take, if further ones were like those that "
        "are resident now; as figure 5 of the paper. At today's number of variants it is what is "
        "measured. The share that is saved is on the right."
    )
    return over_number(
        "Memory over the number of variants, projected",
        what,
        series={"shared": (PROJECTED, GREEN), "separate copies": (PROJECTED_COPIES, ORANGE)},
        ratio=(BLUE, Query(PROJECTED_RATIO, "saved")),
    )


def _trace() -> xychart.Panel:
    what = (
        "The same as it was: a point for every moment of the time shown. It grows to the right as "
        "variants are loaded."
    )
    return as_it_was(
        "Memory over the number of variants, as it was",
        what,
        along=Query(RESIDENT, "resident variants"),
        series={"shared": (HELD, GREEN), "separate copies": (COPIES, ORANGE)},
    )
