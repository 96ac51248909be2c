"""The figures at the top of the dashboards *Savings* and *Serving*."""

from __future__ import annotations

from grafana_foundation_sdk.builders import stat

from configs.grafana.generator.charts import tile
from configs.grafana.generator.queries import LATELY, MODEL, SERVER, Query, quantile, rate
from configs.grafana.generator.savings_queries import RESIDENT, SAVED, SAVED_RATIO
from configs.grafana.generator.style import (
    GREEN,
    RED,
    YELLOW,
    by_threshold,
    in_words,
    thresholds,
)


def saved_bytes() -> stat.Panel:
    """Returns what sharing saves."""
    what = (
        "What separate copies of the resident models of the chosen families would take, less what "
        "the families hold. Models that are not on the device count as nothing."
    )
    panel = tile("Saved", what, "bytes", Query(SAVED))
    return panel.color_scheme(by_threshold()).thresholds(thresholds(GREEN))


def saved_ratio() -> stat.Panel:
    """Returns the share that sharing saves."""
    what = "Saved bytes, of what separate copies would take."
    return (
        tile("Saved of separate copies", what, "percentunit", Query(SAVED_RATIO))
        .decimals(1)
        .no_value("nothing is resident")
        .color_scheme(by_threshold())
        .thresholds(thresholds(GREEN))
    )


def resident_variants() -> stat.Panel:
    """Returns how many models are on the device."""
    what = "Models that are on the device now, donors included."
    return tile("Resident variants", what, "none", Query(RESIDENT)).decimals(0)


def tokens_per_second() -> stat.Panel:
    """Returns how fast tokens are generated."""
    query = Query(f"sum({rate('linker_generation_tokens_total', MODEL)})")
    what = "Tokens generated a second, over all requests for the chosen models."
    return tile("Tokens/s", what, "short", query).decimals(1)


def first_token() -> stat.Panel:
    """Returns how long most requests wait for their first token."""
    query = quantile(0.95, "linker_time_to_first_token_seconds", MODEL, window=LATELY)
    what = (
        "95 % of requests of the last five minutes had their first token within this time. One in "
        "a hundred may take longer than 2.5 s."
    )
    return (
        tile("First token, p95", what, "s", Query(query))
        .no_value("no request yet")
        .color_scheme(by_threshold())
        .thresholds(thresholds(GREEN, (1.0, YELLOW), (2.5, RED)))
    )


def inter_token() -> stat.Panel:
    """Returns how long most tokens come after the one before."""
    query = quantile(0.95, "linker_inter_token_latency_seconds", MODEL, window=LATELY)
    what = "95 % of tokens of the last five minutes came this soon after the one before."
    return (
        tile("Between tokens, p95", what, "s", Query(query))
        .no_value("no request yet")
        .color_scheme(by_threshold())
        .thresholds(thresholds(GREEN, (0.25, YELLOW), (1.0, RED)))
    )


def engine() -> stat.Panel:
    """Returns whether engines run."""
    query = Query(f"min(linker_engine_up{{{SERVER}}})")
    what = "Down where an engine of the chosen servers is starting, stalled or dead."
    return (
        tile("Engine", what, "none", query)
        .no_value("no server is scraped")
        .mappings([in_words([("down", RED), ("running", GREEN)])])
        .color_scheme(by_threshold())
    )


def alerts() -> stat.Panel:
    """Returns how many alerts fire."""
    firing = f'ALERTS{{alertname=~"Linker.+",alertstate="firing",{SERVER}}}'
    what = "Alerts that fire now; docs/monitoring.md says what each means and what to do."
    return (
        tile("Alerts", what, "none", Query(f"count({firing}) or vector(0)"))
        .mappings([in_words([("none", GREEN)])])
        .color_scheme(by_threshold())
        .thresholds(thresholds(GREEN, (1, RED)))
    )


def requests() -> stat.Panel:
    """Returns how many sequences there are."""
    running = f"sum(linker_num_requests_running{{{MODEL}}})"
    waiting = f"sum(linker_num_requests_waiting{{{MODEL}}})"
    what = "Sequences that are running in the engine or wait for their first step."
    return tile("Running or waiting", what, "none", Query(f"{running} + {waiting}")).decimals(0)
