"""The dashboard *Serving*: whether the server is well, and how fast it answers."""

from __future__ import annotations

from grafana_foundation_sdk.builders import statetimeline, timeseries
from grafana_foundation_sdk.models.dashboard import Dashboard

from configs.grafana.generator import tiles
from configs.grafana.generator.charts import events, lines, stacked, states
from configs.grafana.generator.latency import latency
from configs.grafana.generator.layout import Band, Section, laid_out
from configs.grafana.generator.queries import MODEL, SERVER, Query, rate
from configs.grafana.generator.saturation import saturation
from configs.grafana.generator.style import BLUE, GREEN, GREY, RED, colored


def serving() -> Dashboard:
    """Returns the dashboard."""
    figures = (
        tiles.engine(),
        tiles.alerts(),
        tiles.requests(),
        tiles.tokens_per_second(),
        tiles.first_token(),
        tiles.inter_token(),
    )
    throughput = (
        Band(height=9, widths=(8, 8, 8), panels=(_tokens(), _tokens_by_model(), _finished())),
    )
    errors = (
        Band(height=8, widths=(8, 8, 8), panels=(_failures(), _rejections(), _engine())),
        Band(height=8, widths=(8, 8, 8), panels=(_restarts(), _cpu(), _resident())),
    )
    sections = (
        Section(title=None, bands=(Band(height=4, widths=(4,) * 6, panels=figures),)),
        Section(title="Throughput", bands=throughput),
        latency(),
        saturation(),
        Section(title="Errors and health", bands=errors),
    )
    what = "Throughput, latency, saturation and errors of the server."
    return laid_out("linker-serving", "LinkerLLM / Serving", what, sections)


def _tokens() -> timeseries.Panel:
    what = "Tokens a second, generated and of prompts, those found in the prefix cache included."
    return lines(
        "Generated and prompt tokens/s",
        what,
        "short",
        Query(f"sum({rate('linker_generation_tokens_total', MODEL)})", "generated"),
        Query(f"sum({rate('linker_prompt_tokens_total', MODEL)})", "of prompts"),
    )


def _tokens_by_model() -> timeseries.Panel:
    what = "Tokens generated a second, by the model that was asked for."
    query = f"sum by (model) ({rate('linker_generation_tokens_total', MODEL)})"
    return stacked("Generated tokens/s by variant", what, "short", Query(query, "{{model}}"))


def _finished() -> timeseries.Panel:
    what = (
        "Sequences that ended a second, by how: at a stop, at their length, given up by the client "
        "(abort), or with an error."
    )
    query = f"sum by (finished_reason) ({rate('linker_request_success_total', MODEL)})"
    panel = stacked("Finished/s", what, "reqps", Query(query, "{{finished_reason}}"))
    for reason, color in (("stop", GREEN), ("length", BLUE), ("abort", GREY), ("error", RED)):
        panel = panel.override_by_name(reason, [colored(color)])
    return panel


def _failures() -> timeseries.Panel:
    ended = "linker_request_success_total"
    with_error = f'{MODEL},finished_reason="error"'
    failed = f"sum({rate(ended, with_error)})"
    what = "Share of the sequences that ended which ended with an error."
    query = Query(f"{failed} / (sum({rate(ended, MODEL)}) > 0)", "with an error")
    panel = lines("Error share", what, "percentunit", query)
    return panel.override_by_name("with an error", [colored(RED)])


def _rejections() -> timeseries.Panel:
    what = (
        "Requests that were refused, by the code of the error: invalid ones as well as those that "
        "no place was left for."
    )
    counted = f"sum by (reason) (increase(linker_rejections_total{{{SERVER}}}[$__interval]))"
    panel = events("Rejections", what, Query(f"round({counted}) > 0", "{{reason}}"))
    return panel.no_value("no request was refused")


def _engine() -> statetimeline.Panel:
    what = "Whether the engine ran. Down: it was starting, stalled or dead."
    query = Query(f"max by (instance) (linker_engine_up{{{SERVER}}})", "{{instance}}")
    return states("Engine, over time", what, [("down", RED), ("running", GREEN)], query)


def _restarts() -> timeseries.Panel:
    what = "Engine processes that replaced one that ended."
    counted = f"sum by (instance) (increase(linker_engine_restarts_total{{{SERVER}}}[$__interval]))"
    return events("Engine restarts", what, Query(f"round({counted})", "{{instance}}"))


def _cpu() -> timeseries.Panel:
    what = (
        "Cores that the server's own process keeps busy: HTTP, tokenizing, streaming. The engine "
        "is a process of its own."
    )
    query = f"sum by (instance) ({rate('process_cpu_seconds_total', SERVER)})"
    return lines("CPU of the gateway", what, "none", Query(query, "{{instance}}")).decimals(2)


def _resident() -> timeseries.Panel:
    what = "Resident memory of the server's own process; weights and KV pages are the engine's."
    query = f"sum by (instance) (process_resident_memory_bytes{{{SERVER}}})"
    return lines("Memory of the gateway", what, "bytes", Query(query, "{{instance}}"))
