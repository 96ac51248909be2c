"""Counters and histograms that one thread writes and any thread renders.

There is one observation for every token, and dozens of histograms for every model: adding to one
takes a fraction of a microsecond, rendering one a few. Those that are written on more than one
thread, or rarely, are prometheus_client's.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from itertools import accumulate

from server.metrics.families import Family, Kind
from server.metrics.text import series, template


class Counter:
    """A number that only grows.

    Args:
        family: Of kind COUNTER.
        labels: A value for each of the family's.
    """

    __slots__ = ("_text", "value")

    def __init__(self, family: Family, labels: Mapping[str, str]) -> None:
        assert family.kind is Kind.COUNTER
        assert labels.keys() == set(family.labels)
        self._text = template([series(family.name, labels)])
        self.value = 0

    def render(self) -> str:
        """Returns the series' line."""
        return self._text % self.value


class Histogram:
    """How often values fell between edges.

    Args:
        family: Of kind HISTOGRAM.
        labels: A value for each of the family's.
    """

    __slots__ = ("_counts", "_edges", "_sum", "_text")

    def __init__(self, family: Family, labels: Mapping[str, str]) -> None:
        assert family.kind is Kind.HISTOGRAM
        assert labels.keys() == set(family.labels)
        self._edges = family.buckets
        self._counts = [0] * (len(family.buckets) + 1)  # the last is above every edge
        self._sum = 0.0
        bucket, total, count = family.samples
        edges = (*map(str, family.buckets), "+Inf")
        buckets = (series(bucket, {**labels, "le": edge}) for edge in edges)
        self._text = template([*buckets, series(count, labels), series(total, labels)])

    def observe(self, value: float, times: int = 1) -> None:
        """Adds a value, as often as it occurred."""
        self._counts[bisect_left(self._edges, value)] += times
        self._sum += value * times

    def render(self) -> str:
        """Returns the series' lines; buckets and count agree whatever is being written."""
        reached = tuple(accumulate(self._counts))
        return self._text % (*reached, reached[-1], self._sum)
