from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client import Histogram as LibraryHistogram
from prometheus_client.parser import text_string_to_metric_families

from server.metrics.families import FAMILIES, Family, Kind
from server.metrics.series import Counter, Histogram
from server.metrics.text import header

TTFT = FAMILIES["linker_time_to_first_token_seconds"]
Samples = dict[tuple[str, str | None], float]


def samples(text: str) -> Samples:
    """Values by name and upper edge."""
    return {
        (sample.name, sample.labels.get("le")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


@given(
    observed=st.lists(
        st.tuples(st.floats(0, 1e6) | st.sampled_from(TTFT.buckets), st.integers(1, 5))
    )
)
def test_histogram_says_what_the_librarys_says(observed: list[tuple[float, int]]) -> None:
    registry = CollectorRegistry()
    library = LibraryHistogram(
        TTFT.name, TTFT.help, TTFT.labels, buckets=TTFT.buckets, registry=registry
    ).labels("m")
    ours = Histogram(TTFT, {"model": "m"})
    for value, times in observed:
        ours.observe(value, times)
        for _ in range(times):
            library.observe(value)
    found, expected = (
        samples(header(TTFT) + ours.render()),
        samples(generate_latest(registry).decode()),
    )
    total = (f"{TTFT.name}_sum", None)
    assert found.pop(total) == pytest.approx(expected.pop(total))
    assert found == expected


def test_histogram_without_an_observation_is_all_zeros() -> None:
    found = samples(header(TTFT) + Histogram(TTFT, {"model": "m"}).render())
    assert len(found) == len(TTFT.buckets) + 3
    assert set(found.values()) == {0.0}


def test_value_on_an_edge_is_below_it() -> None:
    family = Family(name="x", kind=Kind.HISTOGRAM, help="", buckets=(1.0, 2.0))
    histogram = Histogram(family, {})
    histogram.observe(1.0)
    histogram.observe(2.5, times=3)
    assert histogram.render().splitlines() == [
        'x_bucket{le="1.0"} 1', 'x_bucket{le="2.0"} 1', 'x_bucket{le="+Inf"} 4',
        "x_count 4", "x_sum 8.5",
    ]  # fmt: skip


def test_counter_counts() -> None:
    counter = Counter(FAMILIES["linker_prompt_tokens_total"], {"model": 'a"%'})
    counter.value += 3
    assert counter.render() == 'linker_prompt_tokens_total{model="a\\"%"} 3\n'


@pytest.mark.parametrize("labels", [{}, {"model": "m", "more": "x"}, {"other": "m"}])
def test_series_has_its_familys_labels(labels: dict[str, str]) -> None:
    with pytest.raises(AssertionError):
        Counter(FAMILIES["linker_prompt_tokens_total"], labels)
    with pytest.raises(AssertionError):
        Histogram(TTFT, labels)
