"""What the checks of names read out of expressions."""

from __future__ import annotations

from tests.monitoring.dashboards import as_regex, filled_in
from tests.monitoring.selectors import Wanted, labels_in, names_in, values_in

EXPRESSION = (
    'sum by (le) (rate(linker_x_seconds_bucket{job=~"$job",le="2.5"}[$__interval])) / on (job) '
    'instance:linker_late:ratio_rate5m{reason=~"full|late",model!~"a.*"} > up{job="linker_not"}'
)


def test_names_are_metrics_and_recorded_series() -> None:
    assert names_in(EXPRESSION) == {"linker_x_seconds_bucket", "instance:linker_late:ratio_rate5m"}


def test_labels_come_with_their_metrics() -> None:
    assert list(labels_in(EXPRESSION)) == [
        ("linker_x_seconds_bucket", "job"),
        ("linker_x_seconds_bucket", "le"),
        ("instance:linker_late:ratio_rate5m", "reason"),
        ("instance:linker_late:ratio_rate5m", "model"),
        ("up", "job"),
    ]


def test_values_are_words_and_not_variables_and_patterns() -> None:
    assert list(values_in(EXPRESSION)) == [
        Wanted("linker_x_seconds_bucket", "le", "2.5"),
        Wanted("instance:linker_late:ratio_rate5m", "reason", "full"),
        Wanted("instance:linker_late:ratio_rate5m", "reason", "late"),
        Wanted("up", "job", "linker_not"),
    ]


def test_variables_are_filled_in_as_grafana_does_it() -> None:
    chosen = {"model": as_regex(["org/a.b", "c+"]), "instance": as_regex(["one:80"])}
    expression = 'x{model=~"$model",instance=~"${instance:regex}"}[$__rate_interval]'
    expected = r'x{model=~"(org/a\\.b|c\\+)",instance=~"one:80"}[20s]'
    assert filled_in(expression, chosen) == expected
