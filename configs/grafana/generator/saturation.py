"""How full the server is."""

from __future__ import annotations

from grafana_foundation_sdk.builders import heatmap, timeseries

from configs.grafana.generator.charts import distribution, events, lines, stacked
from configs.grafana.generator.layout import Band, Section
from configs.grafana.generator.queries import (
    MODEL,
    SERVER,
    SHORTLY,
    Query,
    mean,
    quantiles,
    rate,
)
from configs.grafana.generator.style import BLUE, GREEN, GREY, ORANGE, PURPLE, colored

_VARIANTS = "linker_batch_variants"


def saturation() -> Section:
    """Returns the section."""
    return Section(
        title="Saturation",
        bands=(
            Band(height=9, widths=(8, 8, 8), panels=(_sequences(), _by_model(), _queue())),
            Band(height=9, widths=(8, 8, 8), panels=(_mix(), _mix_spread(), _steps())),
            Band(height=9, widths=(8, 8, 8), panels=(_pages(), _prefix(), _preemptions())),
            Band(height=9, widths=(24,), panels=(_memory(),)),
        ),
    )


def _sequences() -> timeseries.Panel:
    what = "Sequences in the engine: those that run, and those that wait for their first step."
    panel = stacked(
        "Running and waiting",
        what,
        "none",
        Query(f"sum(linker_num_requests_running{{{MODEL}}})", "running"),
        Query(f"sum(linker_num_requests_waiting{{{MODEL}}})", "waiting"),
    )
    panel = panel.override_by_name("running", [colored(GREEN)])
    return panel.override_by_name("waiting", [colored(ORANGE)])


def _by_model() -> timeseries.Panel:
    what = "Sequences that run or wait, by the model that was asked for."
    both = " + ".join(
        f"sum by (model) (linker_num_requests_{state}{{{MODEL}}})"
        for state in ("running", "waiting")
    )
    return stacked("Running and waiting by variant", what, "none", Query(both, "{{model}}"))


def _queue() -> timeseries.Panel:
    what = "From the submission of a sequence to the engine to the first step that computes it."
    waited = quantiles("linker_request_queue_time_seconds", MODEL)
    return lines("Time in the queue", what, "s", *waited)


def _mix() -> timeseries.Panel:
    what = (
        "How many variants a step computes for at once. One is what separate servers would do; "
        "more go through the shared blocks together."
    )
    average = Query(mean(_VARIANTS, SERVER), "mean")
    return lines("Variants in a batch", what, "none", average, *quantiles(_VARIANTS, SERVER)[1:])


def _mix_spread() -> heatmap.Panel:
    what = "How many steps computed for how many variants at once."
    buckets = f"sum by (le) (increase({_VARIANTS}_bucket{{{SERVER}}}[{SHORTLY}]))"
    return distribution("Variants in a batch, spread", what, "none", buckets)


def _steps() -> timeseries.Panel:
    what = "Batches computed a second. None while sequences run or wait means a stuck engine."
    query = f"sum by (instance) ({rate('linker_engine_steps_total', SERVER)})"
    return lines("Steps/s", what, "ops", Query(query, "{{instance}}"))


def _pages() -> timeseries.Panel:
    what = "KV pages in use, of all. At 100 % sequences are put back to make room."
    query = f"max by (instance) (linker_kv_cache_usage_ratio{{{SERVER}}})"
    return lines("KV pages in use", what, "percentunit", Query(query, "{{instance}}")).max(1)


def _prefix() -> timeseries.Panel:
    what = "Share of prompt tokens that were found in the prefix cache and not computed again."
    hits = f"sum by (instance) ({rate('linker_prefix_cache_hits_total', SERVER)})"
    asked = f"sum by (instance) ({rate('linker_prefix_cache_queries_total', SERVER)})"
    query = Query(f"{hits} / ({asked} > 0)", "{{instance}}")
    return lines("Prefix cache hits", what, "percentunit", query).max(1)


def _preemptions() -> timeseries.Panel:
    what = "Sequences that were put back to make room for others; they are computed again."
    counted = f"sum by (instance) (increase(linker_num_preemptions_total{{{SERVER}}}[$__interval]))"
    return events("Preemptions", what, Query(f"round({counted})", "{{instance}}"))


def _memory() -> timeseries.Panel:
    what = (
        "The memory budget by use: weights, KV pages, what is set aside for other processes or "
        "being loaded (other), and what is free."
    )
    query = f"sum by (state) (linker_device_memory_bytes{{{SERVER}}})"
    panel = stacked("Device memory", what, "bytes", Query(query, "{{state}}"))
    for state, color in (("weights", BLUE), ("kv", PURPLE), ("other", GREY), ("free", GREEN)):
        panel = panel.override_by_name(state, [colored(color)])
    return panel
