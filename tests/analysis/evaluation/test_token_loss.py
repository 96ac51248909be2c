"""Means over units and their errors, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from analysis.evaluation.token_loss import TokenLoss


def test_the_mean_is_over_tokens_and_not_over_units() -> None:
    loss = TokenLoss(nats=(2.0, 30.0), num_tokens=(1, 9))
    assert loss.mean == pytest.approx(3.2)
    assert loss.perplexity == pytest.approx(math.exp(3.2))


def test_with_equal_units_the_error_is_that_of_a_mean() -> None:
    nats = (10.0, 14.0, 12.0, 20.0)
    loss = TokenLoss(nats=nats, num_tokens=(4, 4, 4, 4))
    assert loss.stderr == pytest.approx(np.std(np.array(nats) / 4, ddof=1) / 2)


def test_one_unit_has_no_error_and_its_change_no_interval() -> None:
    loss = TokenLoss(nats=(4.0,), num_tokens=(2,))
    assert loss.stderr is None
    change = loss.change_from(TokenLoss(nats=(2.0,), num_tokens=(2,)))
    assert change.percent == pytest.approx(100 * (math.e - 1))
    assert change.low is None
    assert change.high is None


def test_a_change_that_all_units_share_has_no_width() -> None:
    """What makes a unit hard cancels out: the units differ much, the change by nothing."""
    base = TokenLoss(nats=(10.0, 90.0, 50.0), num_tokens=(10, 10, 10))
    harder = TokenLoss(nats=(11.0, 91.0, 51.0), num_tokens=(10, 10, 10))
    change = harder.change_from(base)
    expected = 100 * (math.exp(0.1) - 1)
    assert [change.percent, change.low, change.high] == pytest.approx([expected] * 3)


def test_the_interval_of_a_change_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    truth, covered = 100 * (math.exp(0.05) - 1), 0
    for _ in range(400):
        tokens = tuple(int(n) for n in rng.integers(5, 50, 30))
        base = np.array([n * rng.normal(3, 1) for n in tokens])
        gained = np.array([n * rng.normal(0.05, 0.02) for n in tokens])
        change = TokenLoss(nats=tuple(base + gained), num_tokens=tokens).change_from(
            TokenLoss(nats=tuple(base), num_tokens=tokens)
        )
        assert change.low is not None
        assert change.high is not None
        covered += change.low <= truth <= change.high
    assert 0.90 < covered / 400 < 0.99


@pytest.mark.parametrize("nats", [1e6, math.nan, math.inf])
def test_a_model_that_diverged_has_an_infinite_perplexity_and_null_in_json(nats: float) -> None:
    base = TokenLoss(nats=(1.0, 2.0), num_tokens=(1, 1))
    loss = TokenLoss(nats=(nats, 1.0), num_tokens=(1, 1))
    assert loss.perplexity == math.inf
    assert loss.to_json()["perplexity"] is None
    assert loss.change_from(base).to_json()["percent"] is None
