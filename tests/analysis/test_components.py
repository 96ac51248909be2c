"""FM tables 2 and 6 from records whose numbers are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from analysis.components import (
    by_component,
    correlate,
    correlate_families,
    gap_per_layer,
    layer_curve,
)
from analysis.record import TensorStudy
from analysis.study import study_tensor
from tests.analysis.test_study import gram_of


@cache
def plain() -> TensorStudy:
    rng = np.random.default_rng(0)
    gram = gram_of(rng.standard_normal((4, 512)), rng.standard_normal(512))
    return study_tensor(gram, names=("a", "b", "c", "d"), seed=0, num_draws=19)


def study(component: str | None, layer: int | None, pc1: float | None, **more: Any) -> TensorStudy:
    """A study whose centred PC1 is given; all else is of no meaning."""
    return replace(
        plain(),
        name=f"{layer}.{component}",
        component=component,
        layer=layer,
        pc1_centred=pc1,
        **more,
    )


def family(attention: Sequence[float], mlp: Sequence[float]) -> list[TensorStudy]:
    """One tensor of each part in each layer."""
    return [
        study(component, layer, pc1)
        for component, curve in (("q", attention), ("up", mlp))
        for layer, pc1 in enumerate(curve)
    ]


def test_by_component_means_over_tensors_by_projection_and_part() -> None:
    rows = by_component([
        study("q", 0, 0.4), study("q", 1, 0.6), study("o", 0, 0.8), study("down", 0, 0.3),
        study(None, None, 0.9),
    ])  # fmt: skip

    assert list(rows) == ["q", "o", "down", "attention", "mlp", "all"]
    assert rows["q"]["pc1_centred"] == pytest.approx(0.5)
    assert rows["attention"]["pc1_centred"] == pytest.approx(0.6)
    assert rows["all"]["pc1_centred"] == pytest.approx(0.6)  # the tensor of no projection, too
    assert [row["num_tensors"] for row in rows.values()] == [2, 1, 1, 3, 1, 5]
    assert rows["all"]["majority_share_centred"] == pytest.approx(3 / 5)
    assert rows["attention"]["cos_mean"] == pytest.approx(plain().cos_mean)
    assert rows["q"]["interval_centred"] == pytest.approx(plain().interval_centred)


def test_by_component_corrects_for_all_tensors_at_once() -> None:
    """Twenty tests at p = 0.04 pass together; one among nineteen of chance does not."""
    alike = [study("q", layer, 0.5, p_value_centred=0.04) for layer in range(20)]
    alone = [study("q", 0, 0.5, p_value_centred=0.04)] + [
        study("up", layer, 0.5, p_value_centred=0.3 + layer / 40) for layer in range(19)
    ]

    assert by_component(alike)["q"]["significant_share_centred"] == 1.0
    assert by_component(alone)["q"]["significant_share_centred"] == 0.0


def test_by_component_without_pc1_has_none() -> None:
    rows = by_component([study("q", 0, None, p_value_centred=None, interval_centred=None)])

    for field in ("pc1", "majority_share", "significant_share", "interval"):
        assert rows["all"][f"{field}_centred"] is None


def test_gap_is_attention_minus_mlp_by_layer() -> None:
    gaps = gap_per_layer(family([0.9, 0.8], [0.5, 0.6]), field="pc1_centred")

    assert gaps == pytest.approx([0.4, 0.2])


def test_gap_of_a_layer_without_mlp_is_none() -> None:
    assert gap_per_layer(family([0.9, 0.8], [0.5]), field="pc1_centred")[1] is None


def test_gaps_keep_their_layers_number_where_layers_before_were_not_looked_at() -> None:
    studies = [study("q", 2, 0.9), study("up", 2, 0.5), study("q", 4, 0.8), study("up", 4, 0.7)]

    gaps = gap_per_layer(studies, field="pc1_centred")

    assert gaps == [None, None, pytest.approx(0.4), None, pytest.approx(0.1)]
    assert gap_per_layer([study(None, None, 0.5)], field="pc1_centred") == []


def test_layer_curve_means_over_a_parts_tensors_and_leaves_out_what_has_no_number() -> None:
    studies = [study("q", 1, 0.5), study("v", 1, 0.7), study("k", 0, 0.1), study("o", 0, None)]

    curve = layer_curve(studies, "attention", field="pc1_centred")

    assert list(curve) == [0, 1]
    assert curve == pytest.approx({0: 0.1, 1: 0.6})


def test_correlation_is_pearsons_with_fishers_interval() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(12)
    y = 0.7 * x + rng.standard_normal(12)
    r = np.corrcoef(x, y)[0, 1]

    found = correlate(x.tolist(), y.tolist())

    assert found is not None
    assert found.r == pytest.approx(r)
    assert found.low is not None
    assert found.high is not None
    assert np.arctanh(found.high) - np.arctanh(found.low) == pytest.approx(
        2 * 1.95996 / 3, rel=1e-4
    )
    assert found.low < r < found.high


def test_correlation_of_unequal_depths_is_by_relative_depth() -> None:
    found = correlate([0.0, 1.0, 0.0, 1.0, 0.0], [0.0, 0.5, 1.0, 0.5, 0.0, 0.5, 1.0, 0.5, 0.0])

    assert found is not None
    assert found.r == pytest.approx(1.0)
    assert found.num_points == 5


@pytest.mark.parametrize("other", [[0.3, 0.3, 0.3], [0.1, 0.2]])
def test_correlation_with_a_constant_or_a_short_curve_is_none(other: list[float]) -> None:
    assert correlate([0.1, 0.2, 0.4], other) is None


# The mean of three times 0.1 is not 0.1, and shares that are equal differ in their last bits.
@pytest.mark.parametrize("constant", [[0.1, 0.1, 0.1], [1.0, 1.0 - 1e-16, 1.0 - 3e-16]])
def test_correlation_of_curves_that_vary_by_round_off_is_none(constant: list[float]) -> None:
    assert correlate(constant, constant) is None
    assert correlate(constant, [0.1, 0.2, 0.4]) is None


def test_families_correlate_in_the_part_that_they_share() -> None:
    attention = [0.5, 0.6, 0.9, 0.7]
    ours = family(attention, [0.5, 0.4, 0.5, 0.6])
    theirs = family([2 * one - 0.5 for one in attention], [0.5, 0.7, 0.4, 0.5])

    rows = correlate_families(ours, theirs, field="pc1_centred")

    assert rows["attention"] is not None
    assert rows["attention"].r == pytest.approx(1.0)
    assert rows["q"] == rows["attention"]
    assert rows["v"] is None  # no such tensor
    assert rows["mlp"] is not None
    assert rows["mlp"].r == pytest.approx(
        np.corrcoef([0.5, 0.4, 0.5, 0.6], [0.5, 0.7, 0.4, 0.5])[0, 1]
    )
    assert rows["gap"] is not None
