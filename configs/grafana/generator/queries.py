"""PromQL that obeys the variables of the dashboards."""

from __future__ import annotations

from typing import NamedTuple

# What a series may be filtered by depends on the labels that it has.
SERVER = 'job=~"$job",instance=~"$instance"'
FAMILY = f'{SERVER},family=~"$family"'
MODEL = f'{SERVER},model=~"$model"'
MEMBER = f'{FAMILY},model=~"$model"'  # of a family

# Long enough for four scrapes, as Grafana reckons from the step and the data source's interval.
SHORTLY = "$__rate_interval"
LATELY = "5m"  # what a tile sums up


class Query(NamedTuple):
    """An expression, and what its series are called.

    A legend names labels as `{{label}}`.
    """

    expr: str
    legend: str = ""


def rate(metric: str, scope: str, window: str = SHORTLY) -> str:
    """Returns a counter's increase per second."""
    return f"rate({metric}{{{scope}}}[{window}])"


def quantile(share: float, histogram: str, scope: str, *, window: str = SHORTLY) -> str:
    """Returns the value that `share` of what a histogram counted lies below."""
    buckets = f"sum by (le) ({rate(f'{histogram}_bucket', scope, window)})"
    return f"histogram_quantile({share}, {buckets})"


def quantile_by(
    label: str, share: float, histogram: str, scope: str, *, window: str = SHORTLY
) -> str:
    """Returns such a value for every value of a label."""
    buckets = f"sum by (le, {label}) ({rate(f'{histogram}_bucket', scope, window)})"
    return f"histogram_quantile({share}, {buckets})"


def quantiles(histogram: str, scope: str) -> tuple[Query, Query, Query]:
    """Returns the median, what 95 % and what 99 % lie below."""
    return (
        Query(quantile(0.5, histogram, scope), "median"),
        Query(quantile(0.95, histogram, scope), "p95"),
        Query(quantile(0.99, histogram, scope), "p99"),
    )


def mean(histogram: str, scope: str, *, window: str = SHORTLY) -> str:
    """Returns the mean of what a histogram counted; absent where it counted nothing."""
    total = rate(f"{histogram}_sum", scope, window)
    number = rate(f"{histogram}_count", scope, window)
    return f"sum({total}) / (sum({number}) > 0)"


def in_words(metric: str, scope: str, label: str, values: tuple[str, ...], *, by: str) -> str:
    """Returns which of its values a label has where a gauge is 1, by its place in `values`."""
    cases = (
        f'{place} * ({metric}{{{scope},{label}="{value}"}} == 1)'
        for place, value in enumerate(values)
    )
    return f"max by ({by}) ({' or '.join(cases)})"
