"""A real Prometheus scrapes a real server under traffic, and every expression is evaluated on it.

What is rare has not happened at first, and is provoked then.
"""

from __future__ import annotations

import math
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import httpx
import pytest

from server.metrics.families import FAMILIES, Kind
from tests.monitoring.dashboards import (
    FILES,
    Target,
    Variable,
    chosen_all,
    filled_in,
    targets,
    values_of,
    variables,
)
from tests.monitoring.fleet import (
    MODELS,
    ask_everything,
    fleet,
    onboard_everything,
    study_everything,
)
from tests.monitoring.prometheus import Prometheus
from tests.monitoring.promtool import Rule, rules
from tests.monitoring.provoking import lower_budget
from tests.monitoring.selectors import Wanted, values_in
from tests.server.live import LiveServer

TARGETS, VARIABLES = list(targets()), list(variables())
RECORDS = [rule for rule in rules() if rule.record]
EXPRESSIONS = [rule.expr for rule in rules()] + [target.expr for target in TARGETS]
WANTED = sorted({wanted for expression in EXPRESSIONS for wanted in values_in(expression)})
pytestmark = pytest.mark.timeout(900)  # five models are onboarded first, one of them tuned
# Panels that have nothing to show until something happened that mostly does not.
RARE = {
    ("LinkerLLM / Savings", "Alerts"),
    ("LinkerLLM / Serving", "Alerts"),
    ("LinkerLLM / Weights", "Alerts"),
    ("LinkerLLM / Serving", "Rejections"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """A server, and the Prometheus that scrapes it."""

    live: LiveServer
    prometheus: Prometheus
    since_s: float  # when what it shows began, by the time of Prometheus
    chosen: dict[tuple[str, bool], dict[str, str]] = field(default_factory=dict)  # as asked for

    def until_data(self, target: Target, *, singly: bool = False) -> None:
        """Waits until a panel's query gives a number, with everything chosen.

        It mostly does at once; for the moment after a scrape that came too late nothing does.
        """
        self.prometheus.until(lambda: self._has_data(target, singly=singly))

    def _has_data(self, target: Target, *, singly: bool) -> bool:
        board = target.dashboard, singly
        if board not in self.chosen:
            self.chosen[board] = chosen_all(self.prometheus, target.dashboard, singly=singly)
        expression = filled_in(target.expr, self.chosen[board], step=target.step)
        if target.instant:
            return self.prometheus.has_data(expression)
        samples = self.prometheus.query_range(expression, since_s=self.since_s)
        return any(math.isfinite(value) for sample in samples for value in sample.values)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """After a while of traffic in which nothing went wrong."""
    root, directory = tmp_path_factory.mktemp("fleet"), tmp_path_factory.mktemp("prometheus")
    with (
        fleet(root) as (live, key),
        Prometheus.watching(live.url.removeprefix("http://"), key, directory / "own") as prometheus,
    ):
        prometheus.until_scraped()
        since_s = prometheus.now_s()
        onboard_everything(live, root)
        study_everything(live)
        prometheus.until_scraped()
        ask_everything(live)
        prometheus.until_scraped()
        yield Watched(live=live, prometheus=prometheus, since_s=since_s)


@pytest.fixture(scope="module")
def troubled(watched: Watched) -> Watched:
    """After an eviction, a preemption, a refusal, a client that hung up, an engine's death, and
    an alert.
    """
    live, prometheus = watched.live, watched.prometheus
    since_s = prometheus.now_s()
    assert live.client.post("/models/unload", json={"model": "apart"}).status_code == httpx.codes.OK
    assert live.chat("nobody").status_code == httpx.codes.NOT_FOUND
    body = {"model": "base", "prompt": "Once", "max_tokens": 200, "ignore_eos": True}
    with live.client.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
        next(stream.iter_lines())
    with live.client.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
        lines = stream.iter_lines()
        next(lines)
        pid = live.services.engine.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert any("error" in line for line in lines)
    live.until_ready()
    live.until(lambda: live.chat("base", max_tokens=4).status_code == httpx.codes.OK)
    live.until(lambda: live.chat("apart", max_tokens=4).status_code == httpx.codes.OK)
    prometheus.until(lambda: prometheus.has_data("linker_engine_up == 1"))
    ask_everything(live)
    lower_budget(live, "far")
    prometheus.until_scraped()
    return Watched(live=live, prometheus=prometheus, since_s=since_s)


def test_scrapes_succeed_and_rules_are_evaluated(watched: Watched) -> None:
    prometheus = watched.prometheus
    prometheus.until(lambda: prometheus.value('up{job="linker"}') == 1)
    for counter in (
        "prometheus_rule_evaluation_failures_total",
        "prometheus_target_scrapes_sample_duplicate_timestamp_total",
        "prometheus_target_scrapes_sample_out_of_order_total",
    ):
        assert set(prometheus.own_values(counter)) == {0.0}, counter


def test_families_exposed_are_those_of_the_table(watched: Watched) -> None:
    said = watched.prometheus.metadata()
    assert said.keys() == FAMILIES.keys()
    for name, family in FAMILIES.items():
        assert said[name]["type"] == family.kind
        assert said[name]["help"] == family.help


@pytest.mark.parametrize("name", FAMILIES)
def test_family_has_series_with_its_labels_and_buckets(watched: Watched, name: str) -> None:
    family = FAMILIES[name]
    expected = {"__name__", "job", "instance", *family.labels}
    for sample in family.samples:
        found = watched.prometheus.series(sample)
        assert found
        more = {"le"} if sample.endswith("_bucket") and family.kind is Kind.HISTOGRAM else set()
        assert all(series.keys() == expected | more for series in found)
    if family.buckets:
        edges = {float(series["le"]) for series in watched.prometheus.series(f"{name}_bucket")}
        assert edges == {*family.buckets, math.inf}


def test_every_model_has_its_series_and_nobody_else(watched: Watched) -> None:
    assert set(watched.prometheus.label_values("model")) == set(MODELS)


def test_saved_bytes_are_those_of_the_cards(watched: Watched) -> None:
    cards = watched.live.client.get("/models").json()["data"]
    for card in cards:
        saved = watched.prometheus.value(f'model:linker_saved_bytes{{model="{card["id"]}"}}')
        assert saved == card["bytes"]["saved"]
    total = watched.prometheus.value("instance:linker_saved_bytes")
    assert total == sum(card["bytes"]["saved"] for card in cards) > 0
    assert watched.prometheus.value("instance:linker_resident_variants") == len(MODELS)


def test_gauges_of_a_family_are_those_of_its_study(watched: Watched) -> None:
    prometheus, summary = watched.prometheus, study_everything(watched.live)["summary"]
    assert set(summary["variants"]) == {*MODELS} - {"base"}
    for component, row in summary["components"].items():
        of = f'{{family="base",component="{component}"}}'
        assert prometheus.value(f"linker_pc1_variance_ratio{of}") == row["pc1_centred"]
        assert prometheus.value(f"linker_pc1_null_ratio{of}") == row["null95_centred"]
        assert prometheus.value(f"linker_kernel_snr{of}") == row["snr"]
    for model, row in summary["variants"].items():
        of = f'{{model="{model}"}}'
        assert prometheus.value(f"linker_delta_norm{of}") == row["delta_norm"]
        assert prometheus.value(f"linker_jackknife_cosine{of}") == row["jackknife_cosine"]
        found = {
            sample.labels["kind"] for sample in prometheus.query(f"linker_diagnostic{of} == 1")
        }
        assert found == {one["kind"] for one in row["diagnostics"]}
    mean = summary["pairwise_cosine"]["mean"]
    assert prometheus.value('linker_pairwise_cosine{family="base"}') == mean
    ratio = summary["kernel"]["acceptance_ratio"]
    assert prometheus.value("linker_kernel_acceptance_ratio") == ratio
    age_s = prometheus.value("linker_analysis_age_seconds")
    assert 0 < age_s <= study_everything(watched.live)["age_s"]


@pytest.mark.parametrize("rule", RECORDS, ids=lambda rule: str(rule.record))
def test_recorded_series_has_data_and_its_expression_too(watched: Watched, rule: Rule) -> None:
    assert rule.record is not None
    for expression in (rule.record, rule.expr):
        watched.prometheus.until(partial(watched.prometheus.has_data, expression))


def test_server_that_is_well_raises_no_alert_of_trouble(watched: Watched) -> None:
    late = "LinkerTimeToFirstTokenFastBurn"  # tells of the machine that tests run on
    assert watched.prometheus.query(f'ALERTS{{alertname!="{late}"}}') == []


def test_there_are_dashboards_with_queries() -> None:
    assert len(FILES) >= 2
    assert {target.dashboard for target in TARGETS} == {
        variable.dashboard for variable in VARIABLES
    }
    assert {(target.dashboard, target.panel) for target in TARGETS} > RARE


@pytest.mark.parametrize("variable", VARIABLES, ids=str)
def test_variable_of_a_dashboard_has_values(watched: Watched, variable: Variable) -> None:
    chosen = chosen_all(watched.prometheus, variable.dashboard)
    offered = values_of(watched.prometheus, variable.query, chosen)
    assert offered
    if variable.name == "model":
        assert set(offered) == set(MODELS)
    if variable.everything is not None:
        assert all(re.fullmatch(variable.everything, value) for value in offered)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_query_of_a_panel_has_data(watched: Watched, target: Target) -> None:
    if (target.dashboard, target.panel) not in RARE:
        watched.until_data(target)


@pytest.mark.parametrize("wanted", WANTED, ids="-".join)
def test_label_value_that_is_asked_for_exists(troubled: Watched, wanted: Wanted) -> None:
    assert wanted.value in troubled.prometheus.label_values(wanted.label, of=wanted.metric)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_query_of_a_panel_has_data_after_trouble(troubled: Watched, target: Target) -> None:
    troubled.until_data(target)
    troubled.until_data(target, singly=True)


@pytest.mark.parametrize(
    "series",
    [
        'linker_request_success_total{finished_reason="error"}',
        'linker_request_success_total{finished_reason="abort"}',
        'linker_rejections_total{reason="model_not_found"}',
        'linker_evictions_total{reason="request"}',
        "linker_num_preemptions_total",
        "linker_engine_restarts_total",
    ],
)
def test_trouble_is_counted(troubled: Watched, series: str) -> None:
    assert troubled.prometheus.value(f"sum(max_over_time({series}[10m]))") > 0


def test_twin_is_held_and_is_no_copy_saved(troubled: Watched) -> None:
    live, prometheus = troubled.live, troubled.prometheus
    before = prometheus.value("instance:linker_saved_bytes")
    answer = live.chat("near", max_tokens=4, variant_mode="unshared")
    assert answer.status_code == httpx.codes.OK, answer.text
    prometheus.until(lambda: prometheus.value("instance:linker_saved_bytes") < before)
    assert prometheus.value("sum(model:linker_saved_bytes)") == before
