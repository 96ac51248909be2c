"""What sharing costs each variant."""

from __future__ import annotations

from grafana_foundation_sdk.builders import barchart, bargauge, dashboard, table

from configs.grafana.generator.charts import gauges
from configs.grafana.generator.layout import Band, Section
from configs.grafana.generator.queries import MEMBER, MODEL, Query, in_words
from configs.grafana.generator.style import (
    BLUE,
    GREEN,
    ORANGE,
    RED,
    YELLOW,
    colored,
    setting,
    thresholds,
)
from configs.grafana.generator.style import in_words as words
from configs.grafana.generator.tables import beside, listed

STATES = {"ready": GREEN, "unloaded": BLUE, "onboarding": YELLOW, "failed": RED}
_SERVING = "/d/linker-serving?var-model=${__value.text}&${__url_time_range}"
_NOT_PRICED = "no plan has a measured price"


def _of(metric: str) -> str:
    return f"max by (model) ({metric}{{{MODEL}}})"


def variants() -> Section:
    """Returns the section with a line for every model."""
    return Section(title="Variants", bands=(Band(height=9, widths=(24,), panels=(_variants(),)),))


def fidelity() -> Section:
    """Returns the section that compares prices."""
    panels = (_price(), _budget_used(), _agreement(), _perplexity())
    return Section(title="Fidelity", bands=(Band(height=10, widths=(9, 5, 5, 5), panels=panels),))


def _variants() -> table.Panel:
    logical = f'sum by (model, family) (linker_model_weight_bytes{{{MEMBER},kind="logical"}})'
    unique = f'sum by (model) (linker_model_weight_bytes{{{MEMBER},kind="unique"}})'
    saved = f"sum by (model) (model:linker_saved_bytes{{{MEMBER}}})"
    share = f"{saved} / on (model) (sum by (model) ({logical}) > 0)"
    state = in_words("linker_model_state", MODEL, "state", tuple(STATES), by="model")
    columns = (
        Query(logical, "separate copy"),
        Query(state, "state"),
        Query(unique, "unique"),
        Query(saved, "saved"),
        Query(share, "saved %"),
        Query(_of("linker_model_bits_per_weight"), "bits per weight"),
        Query(_of("linker_plan_kl_nats"), "KL"),
        Query(_of("linker_plan_kl_upper_nats"), "KL at most"),
        Query(_of("linker_plan_budget_kl_nats"), "budget"),
        Query(_of("linker_plan_top1_agreement_ratio"), "top-1 agreement"),
        Query(_of("linker_plan_perplexity_ratio"), "perplexity ratio"),
    )
    what = (
        "Every known model: what it takes and saves on the device now (nothing while it is "
        "unloaded), and what its plan costs in fidelity, as it was measured before it was served. "
        "Donors and models without a measured price have none."
    )
    return _formatted(listed("What each variant takes and costs", what, columns))


def _formatted(panel: table.Panel) -> table.Panel:
    gauge = setting("custom.cellOptions", {"type": "gauge", "mode": "basic"})
    background = setting("custom.cellOptions", {"type": "color-background", "mode": "basic"})
    shares = [setting("unit", "percentunit"), setting("decimals", 1)]
    bars = [*shares, gauge, setting("min", 0), setting("max", 1), colored(GREEN)]
    mappings = [words(list(STATES.items())).to_json()]
    panel = panel.override_by_name(
        "state", [setting("unit", "none"), setting("mappings", mappings), background]
    )
    panel = panel.override_by_name("saved %", bars)
    panel = panel.override_by_name("top-1 agreement", shares)
    for name in ("KL", "KL at most", "budget", "perplexity ratio"):
        panel = panel.override_by_name(name, [setting("unit", "none"), setting("decimals", 4)])
    panel = panel.override_by_name(
        "bits per weight", [setting("unit", "none"), setting("decimals", 2)]
    )
    link = dashboard.DashboardLink("How it is served").url(_SERVING).build().to_json()
    return panel.override_by_name(
        "model", [setting("custom.minWidth", 180), setting("links", [link])]
    )


def _price() -> barchart.Panel:
    what = (
        "KL(variant ‖ planned) in nats per response token, the upper end of its confidence "
        "interval, and the budget that this end has to keep."
    )
    panel = beside(
        "KL against the budget",
        what,
        "none",
        Query(_of("linker_plan_kl_nats"), "measured"),
        Query(_of("linker_plan_kl_upper_nats"), "at most"),
        Query(_of("linker_plan_budget_kl_nats"), "budget"),
    )
    for name, color in (("measured", GREEN), ("at most", YELLOW), ("budget", ORANGE)):
        panel = panel.override_by_name(name, [colored(color)])
    return panel.decimals(4).no_value(_NOT_PRICED)


def _budget_used() -> bargauge.Panel:
    what = (
        "The upper end of the measured KL, of the budget, where that is not 0. More than all of it "
        "is never served."
    )
    used = f"{_of('linker_plan_kl_upper_nats')} / ({_of('linker_plan_budget_kl_nats')} > 0)"
    return (
        gauges("Budget used", what, "percentunit", Query(used, "{{model}}"))
        .max(1)
        .no_value(_NOT_PRICED)
        .thresholds(thresholds(GREEN, (0.9, YELLOW), (1.0, RED)))
    )


def _agreement() -> bargauge.Panel:
    what = "Share of response tokens where the plan and the variant prefer the same token."
    query = Query(_of("linker_plan_top1_agreement_ratio"), "{{model}}")
    return (
        gauges("Top-1 agreement", what, "percentunit", query)
        .min(0.8)
        .max(1)
        .decimals(2)
        .no_value(_NOT_PRICED)
        .thresholds(thresholds(RED, (0.9, YELLOW), (0.97, GREEN)))
    )


def _perplexity() -> bargauge.Panel:
    what = "Perplexity under the plan, of that of the unshared variant. 1 is no loss."
    query = Query(_of("linker_plan_perplexity_ratio"), "{{model}}")
    return (
        gauges("Perplexity ratio", what, "none", query)
        .min(0.95)
        .max(1.1)
        .decimals(4)
        .no_value(_NOT_PRICED)
        .thresholds(thresholds(GREEN, (1.02, YELLOW), (1.05, RED)))
    )
