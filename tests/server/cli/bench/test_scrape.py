from __future__ import annotations

import argparse

import pytest

from linker_core.errors import InvalidRequestError
from server.cli.bench.scrape import measure, run
from server.metrics.families import FAMILIES, Kind

PER_MODEL = (  # gauges and counters of one model with blocks of its own and a price
    3 + 4 + 3 + 11 + 1  # weight bytes, states, blocks, rung bytes, bits per weight
    + 5 + 2 + 2 + 4  # prices, load, tokens, ends
    + 4  # sections
)  # fmt: skip
PER_BLOCK = 4  # cosine, epsilon, rung, bytes


def test_scrape_has_every_series_of_every_model_and_block() -> None:
    one, two, taller = (measure(n, blocks, rounds=1) for n, blocks in ((1, 2), (2, 2), (1, 3)))
    histograms = [f for f in FAMILIES.values() if f.kind is Kind.HISTOGRAM]
    lines = sum(len(f.buckets) + 3 for f in histograms if f.labels == ("model",))
    assert two["series"] - one["series"] == PER_MODEL + 2 * PER_BLOCK + lines
    assert taller["series"] - one["series"] == PER_BLOCK
    assert two["bytes"] > one["bytes"]
    for kind in ("unchanged_ms", "after_a_request_of_each_ms", "one_planned_anew_ms"):
        assert 0 < one[kind]["best"] <= one[kind]["median"]


@pytest.mark.parametrize("wrong", ["count", "blocks", "rounds"])
def test_run_wants_at_least_one_of_everything(wrong: str) -> None:
    args = argparse.Namespace(**{"count": 1, "blocks": 1, "rounds": 1, wrong: 0})
    with pytest.raises(InvalidRequestError, match="at least 1"):
        run(args)
