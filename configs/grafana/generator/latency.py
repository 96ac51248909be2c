"""How long requests take, and which part of it."""

from __future__ import annotations

from grafana_foundation_sdk.builders import heatmap, timeseries

from configs.grafana.generator.charts import distribution, lines, stacked
from configs.grafana.generator.layout import Band, Section
from configs.grafana.generator.queries import (
    MODEL,
    SERVER,
    SHORTLY,
    Query,
    mean,
    quantile_by,
    quantiles,
)
from configs.grafana.generator.style import RED, colored, setting

_FIRST = "linker_time_to_first_token_seconds"
_BETWEEN = "linker_inter_token_latency_seconds"
_DASHED = setting("custom.lineStyle", {"fill": "dash", "dash": [10, 8]})


def latency() -> Section:
    """Returns the section."""
    spread = (_first_spread(), _between_spread(), _phases())
    return Section(
        title="Latency",
        bands=(
            Band(height=9, widths=(8, 8, 8), panels=(_first(), _between(), _whole())),
            Band(height=9, widths=(8, 8, 8), panels=spread),
            Band(height=9, widths=(8, 8, 8), panels=(_first_by_model(), _late(), _sizes())),
        ),
    )


def _first() -> timeseries.Panel:
    what = "From the arrival of a request to its first token."
    return lines("Time to first token", what, "s", *quantiles(_FIRST, MODEL))


def _between() -> timeseries.Panel:
    what = (
        "From one token of a sequence to the next, and how long sequences took for each of their "
        "tokens on average."
    )
    whole = Query(mean("linker_request_time_per_output_token_seconds", MODEL), "per sequence")
    return lines("Time between tokens", what, "s", *quantiles(_BETWEEN, MODEL), whole)


def _whole() -> timeseries.Panel:
    what = "From the arrival of a request to the end of its answer."
    asked = quantiles("linker_e2e_request_latency_seconds", MODEL)
    return lines("Whole request", what, "s", *asked)


def _first_spread() -> heatmap.Panel:
    what = "How many requests had their first token after how long."
    buckets = f"sum by (le) (increase({_FIRST}_bucket{{{MODEL}}}[{SHORTLY}]))"
    return distribution("Time to first token, spread", what, "s", buckets)


def _between_spread() -> heatmap.Panel:
    what = "How many tokens came how long after the one before."
    buckets = f"sum by (le) (increase({_BETWEEN}_bucket{{{MODEL}}}[{SHORTLY}]))"
    return distribution("Time between tokens, spread", what, "s", buckets)


def _phases() -> timeseries.Panel:
    what = (
        "Where the time of a request goes, on average: waiting for the first step that computes it "
        "(queue), from there to its first token (prefill), and on to its last (decode)."
    )
    queries = [
        Query(mean(f"linker_request_{phase}_time_seconds", MODEL), phase)
        for phase in ("queue", "prefill", "decode", "inference")
    ]
    both = [
        setting("custom.stacking", {"mode": "none", "group": "B"}),
        setting("custom.fillOpacity", 0),
        _DASHED,
    ]
    return stacked("Phases, mean", what, "s", *queries).override_by_name("inference", both)


def _first_by_model() -> timeseries.Panel:
    what = "95 % of the requests for a model had their first token within this time."
    query = quantile_by("model", 0.95, _FIRST, MODEL)
    return lines("Time to first token by variant, p95", what, "s", Query(query, "{{model}}"))


def _late() -> timeseries.Panel:
    what = (
        "Share of requests whose first token took more than 2.5 s, over four windows. The "
        "objective is 1 %; LinkerTimeToFirstTokenFastBurn fires at 14.4 % over 5 minutes and an "
        "hour, or 6 % over 30 minutes and six hours. All models."
    )
    late = "instance:linker_late_first_tokens:ratio_rate"
    queries = [
        Query(f"max({late}{window}{{{SERVER}}})", f"over {window}")
        for window in ("5m", "30m", "1h", "6h")
    ]
    allowed = Query("vector(0.01)", "allowed")
    panel = lines("Late first tokens", what, "percentunit", *queries, allowed)
    return panel.override_by_name("allowed", [colored(RED), _DASHED])


def _sizes() -> timeseries.Panel:
    what = "Tokens of the prompts and the answers of sequences that ran to their end, on average."
    return lines(
        "Tokens per request, mean",
        what,
        "none",
        Query(mean("linker_request_prompt_tokens", MODEL), "of the prompt"),
        Query(mean("linker_request_generation_tokens", MODEL), "generated"),
    ).decimals(0)
