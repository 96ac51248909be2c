"""How models come and go."""

from __future__ import annotations

from grafana_foundation_sdk.builders import bargauge, statetimeline, timeseries

from configs.grafana.generator.charts import events, gauges, lines, states
from configs.grafana.generator.fidelity import STATES
from configs.grafana.generator.layout import Band, Section
from configs.grafana.generator.queries import MODEL, SERVER, Query, in_words, quantile_by
from configs.grafana.generator.style import BLUE, GREEN, GREY, ORANGE, RED, colored

_SECONDS = "linker_admission_seconds"


def onboarding() -> Section:
    """Returns the section."""
    return Section(
        title="Admissions and evictions",
        bands=(
            Band(height=9, widths=(8, 8, 8), panels=(_stages(), _slowest(), _outcomes())),
            Band(height=9, widths=(16, 8), panels=(_states(), _evictions())),
        ),
    )


def _stages() -> bargauge.Panel:
    what = (
        "What a stage of an admission took on average since the server started, of those that were "
        "not skipped: a pair of checkpoints that is known is not scanned again."
    )
    total = f"sum by (stage) ({_SECONDS}_sum{{{SERVER}}})"
    number = f"sum by (stage) ({_SECONDS}_count{{{SERVER}}})"
    query = Query(f"{total} / ({number} > 0)", "{{stage}}")
    return gauges("Admission by stage, mean", what, "s", query).no_value("no admission yet")


def _slowest() -> timeseries.Panel:
    what = "95 % of the admissions of the last hour spent less than this in a stage."
    query = quantile_by("stage", 0.95, _SECONDS, SERVER, window="1h")
    return lines("Admission by stage, p95", what, "s", Query(query, "{{stage}}"))


def _outcomes() -> timeseries.Panel:
    what = "Onboarding jobs that ended, by how."
    counted = f"sum by (outcome) (increase(linker_admissions_total{{{SERVER}}}[$__interval]))"
    panel = events("Admissions", what, Query(f"round({counted})", "{{outcome}}"))
    for outcome, color in (("succeeded", GREEN), ("failed", RED), ("cancelled", GREY)):
        panel = panel.override_by_name(outcome, [colored(color)])
    return panel


def _states() -> statetimeline.Panel:
    what = (
        "Where each model stood: ready (on the device), unloaded (comes back when it is asked "
        "for), being onboarded, or failed."
    )
    expr = in_words("linker_model_state", MODEL, "state", tuple(STATES), by="model")
    return states("State of models", what, list(STATES.items()), Query(expr, "{{model}}"))


def _evictions() -> timeseries.Panel:
    what = (
        "Models that left the device: another needed the room (capacity), nobody asked for them "
        "(idle), or an operator said so (request)."
    )
    counted = f"sum by (reason) (increase(linker_evictions_total{{{SERVER}}}[$__interval]))"
    panel = events("Evictions", what, Query(f"round({counted})", "{{reason}}"))
    for reason, color in (("capacity", ORANGE), ("idle", BLUE), ("request", GREY)):
        panel = panel.override_by_name(reason, [colored(color)])
    return panel
