from __future__ import annotations

import math
from pathlib import Path

import pytest

from analysis.family import StudiedFamily
from analysis.probes import aggregation
from linker_core.errors import InvalidRequestError
from linker_core.sharing.report import BlockScan
from linker_core.sharing.similarity import PairSums
from linker_core.sharing.thresholds import Thresholds
from tests.analysis.probes.columns import records
from tests.tiny import make_checkpoint, make_variant

BIAS = "model.layers.0.self_attn.k_proj.bias"


def _pair(dot: float, a: float, b: float, delta: float) -> PairSums:
    return PairSums(
        dot=dot, donor_square=a, variant_square=b, delta_square=delta, identical=False, count=2
    )


# (3, 4) against (4, 3), and (100, 0) against itself but for its type.
BLOCK = BlockScan(index=0, params={"small": _pair(24, 25, 25, 2), "large": _pair(1e4, 1e4, 1e4, 0)})


def test_aggregations_of_two_tensors_are_those_by_hand() -> None:
    moved = math.sqrt(2) / 5
    assert aggregation.of_mean(BLOCK) == pytest.approx(((0.96 + 1) / 2, moved / 2))
    assert aggregation.of_worst(BLOCK) == pytest.approx((0.96, moved))
    assert aggregation.of_best(BLOCK) == pytest.approx((1.0, 0.0))
    assert aggregation.of_concatenation(BLOCK) == pytest.approx(
        (10_024 / 10_025, math.sqrt(2 / 10_025))
    )


@pytest.mark.parametrize(
    ("pair", "expected"), [(_pair(0, 0, 0, 0), (1, 0)), (_pair(0, 0, 4, 4), (0, 1))]
)
def test_a_block_of_zeros_counts_as_its_tensors_do(
    pair: PairSums, expected: tuple[float, float]
) -> None:
    assert aggregation.of_concatenation(BlockScan(index=0, params={"only": pair})) == expected


def test_one_bias_that_moved_far_hides_in_the_mean_alone(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", dtype="float32")
    moved = make_variant(tmp_path / "moved", base, scale={BIAS: 0.1})
    with StudiedFamily.open(base, {"moved": moved}) as family:
        result = aggregation.measure(family)
    cosines, epsilons, *shared = records(result)
    assert (epsilons["group"], epsilons["blocks"], epsilons["of"]) == ("all", 2, "epsilon")
    assert [row["group"] for row in shared] == ["shared", "shared"]
    # Twelve tensors a block, one of them in one of two blocks at 0.1.
    assert epsilons["mean"] == pytest.approx(0.1 / 24, rel=1e-5)
    assert epsilons["max"] == pytest.approx(0.1 / 2, rel=1e-5)
    assert epsilons["gap"] == pytest.approx(0.1 / 2 - 0.1 / 24, rel=1e-5)
    assert epsilons["worst"] == pytest.approx(0.1, rel=1e-5)
    assert (epsilons["min"], cosines["max"]) == (0.0, 1.0)
    assert isinstance(cosines["worst"], float)
    assert cosines["gap"] == pytest.approx((1 - cosines["worst"]) * (1 / 2 - 1 / 24))
    assert isinstance(epsilons["concatenated"], float)
    assert epsilons["concatenated"] < 0.01
    assert result.facts["moved: farthest tensor"] == "block 0, self_attn.k_proj.bias: ε 0.1000"
    found = [result.facts[f"moved: blocks shared by {name}"] for name in aggregation.AGGREGATIONS]
    assert dict(zip(aggregation.AGGREGATIONS, found, strict=True)) == {
        "mean": 2,
        "worst": 1,
        "best": 2,
        "concatenation": 2,
    }


def test_groups_are_divided_by_the_thresholds_given(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", dtype="float32")
    moved = make_variant(tmp_path / "moved", base, scale={BIAS: 0.1})
    with StudiedFamily.open(base, {"moved": moved}) as family:
        strict = Thresholds(tau_cos=0.999, tau_frob=0.005, source="explicit")
        groups = [row["group"] for row in records(aggregation.measure(family, strict))]
        assert groups[::2] == groups[1::2] == ["all", "shared", "rejected"]
        absurd = Thresholds(tau_cos=2.0, tau_frob=0.005, source="explicit")
        with pytest.raises(InvalidRequestError, match="from -1 to 1"):
            aggregation.measure(family, absurd)


@pytest.mark.shared
def test_a_trained_familys_mean_hides_biases_that_moved_far(mini: StudiedFamily) -> None:
    """Unlike BS table 9, whose families have no such tensor."""
    rows = [row for row in records(aggregation.measure(mini)) if row["of"] == "epsilon"]
    for row in rows:
        if row["group"] == "all":
            assert isinstance(row["worst"], float)
            assert isinstance(row["mean"], float)
            assert row["worst"] > 2 * row["mean"]
