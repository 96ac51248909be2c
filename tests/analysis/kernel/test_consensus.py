"""Each strategy on deltas without an outlier, and with one that was planted."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize

from analysis.kernel.consensus import (
    CosineGating,
    Hierarchical,
    Mean,
    Strategy,
    TrimmedMean,
    WinsorisedMean,
    leading,
)
from analysis.kernel.robust import STRATEGIES, GeometricMedian, LeaveOneOut, ReweightedPca

ROBUST = [kind() for name, kind in STRATEGIES.items() if name != "mean"]
ALL = [kind() for kind in STRATEGIES.values()]
NUM, WIDTH, OUTLIER = 6, 4000, 2


def _name(strategy: Strategy) -> str:
    return strategy.name


def _agreeing(seed: int, *, num: int = NUM) -> NDArray[np.float64]:
    """Deltas that share a direction, of cosine 0.5 to one another."""
    generator = np.random.default_rng(seed)
    shared = generator.standard_normal(WIDTH)
    return np.asarray(shared + generator.standard_normal((num, WIDTH)))


def _with_outlier(seed: int, size: float = 2.0) -> NDArray[np.float64]:
    """The same, one of them larger and in a direction of its own."""
    deltas = _agreeing(seed)
    own = np.random.default_rng(seed + 100).standard_normal(WIDTH)
    deltas[OUTLIER] = own * size * np.linalg.norm(deltas[0]) / np.linalg.norm(own)
    return deltas


def _gram(deltas: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(deltas @ deltas.T)


@pytest.mark.parametrize("strategy", ALL, ids=_name)
@pytest.mark.parametrize("num", [2, 3, 5, 9])
def test_coefficients_sum_to_one(strategy: Strategy, num: int) -> None:
    found = strategy.coefficients(_gram(_agreeing(num, num=num)))
    assert found.shape == (num,)
    assert found.sum() == pytest.approx(1)


@pytest.mark.parametrize("strategy", ALL, ids=_name)
def test_two_fine_tunes_give_the_mean(strategy: Strategy) -> None:
    deltas = _agreeing(0, num=2)
    deltas[1] *= 30
    np.testing.assert_allclose(strategy.coefficients(_gram(deltas)), [0.5, 0.5])


@pytest.mark.parametrize(
    "strategy", [s for s in ALL if not isinstance(s, TrimmedMean | WinsorisedMean)], ids=_name
)
def test_fine_tunes_that_differ_in_nothing_weigh_the_same(strategy: Strategy) -> None:
    gram = np.full((5, 5), 0.3) + 0.7 * np.eye(5)
    if isinstance(strategy, LeaveOneOut):  # no axis is first among equal ones
        gram += 1e-3 * np.diag([2.0, 1, 1, 1, 1])
        assert strategy.coefficients(gram)[1:] == pytest.approx(strategy.coefficients(gram)[1])
        return
    np.testing.assert_allclose(strategy.coefficients(gram), 0.2, atol=1e-9)


@pytest.mark.parametrize("strategy", ROBUST, ids=_name)
@pytest.mark.parametrize("seed", range(5))
def test_an_outlier_weighs_less_than_in_the_mean(strategy: Strategy, seed: int) -> None:
    found = strategy.coefficients(_gram(_with_outlier(seed)))
    others = np.delete(found, OUTLIER)
    assert found[OUTLIER] < 0.75 / NUM
    assert found[OUTLIER] < others.max()


@pytest.mark.parametrize("strategy", ROBUST, ids=_name)
@pytest.mark.parametrize("seed", range(5))
def test_an_outlier_turns_the_consensus_less_than_the_mean(strategy: Strategy, seed: int) -> None:
    generator = np.random.default_rng(seed)
    shared = generator.standard_normal(WIDTH)  # what `_agreeing` shares
    deltas = _with_outlier(seed)

    def likeness(coefficients: NDArray[np.float64]) -> float:
        consensus = coefficients @ deltas
        return float(consensus @ shared / np.linalg.norm(consensus) / np.linalg.norm(shared))

    mean = likeness(Mean().coefficients(_gram(deltas)))
    assert likeness(strategy.coefficients(_gram(deltas))) > mean + 0.02


@pytest.mark.parametrize("strategy", ALL, ids=_name)
def test_the_order_of_fine_tunes_changes_nothing(strategy: Strategy) -> None:
    gram = _gram(_with_outlier(1))
    order = np.random.default_rng(0).permutation(NUM)
    np.testing.assert_allclose(
        strategy.coefficients(gram[np.ix_(order, order)]),
        strategy.coefficients(gram)[order],
        atol=1e-7,
    )


@pytest.mark.parametrize("strategy", ALL, ids=_name)
def test_the_size_of_the_deltas_changes_nothing(strategy: Strategy) -> None:
    gram = _gram(_with_outlier(3))
    np.testing.assert_allclose(
        strategy.coefficients(gram * 1e-14), strategy.coefficients(gram), atol=1e-7
    )


@pytest.mark.parametrize("strategy", ALL, ids=_name)
def test_deltas_of_zero_give_the_mean_of_some(strategy: Strategy) -> None:
    found = strategy.coefficients(np.zeros((4, 4)))
    assert found.sum() == pytest.approx(1)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("centred", [True, False])
def test_leading_is_the_first_right_singular_vector(centred: bool) -> None:
    deltas = _with_outlier(0)
    direction = leading(_gram(deltas), centred=centred) @ deltas
    origin = deltas.mean(axis=0) if centred else 0
    expected = np.linalg.svd(deltas - origin, full_matrices=False)[2][0]
    assert abs(direction @ expected) == pytest.approx(1)
    assert (deltas @ direction).sum() >= 0


def test_cosine_gating_leaves_out_whom_the_threshold_names() -> None:
    gram = np.array([[1, 0.8, 0.1], [0.8, 1, 0.3], [0.1, 0.3, 1]])  # means 0.45, 0.55, 0.2
    kept = CosineGating(threshold=0.45).coefficients(gram)
    np.testing.assert_allclose(kept, [0.5, 0.5, 0])
    np.testing.assert_allclose(CosineGating(threshold=0.9).coefficients(gram), 1 / 3)
    opposed = np.array([[1, -0.2, -0.2], [-0.2, 1, -0.2], [-0.2, -0.2, 1]])
    np.testing.assert_allclose(CosineGating().coefficients(opposed), 1 / 3)


@pytest.mark.parametrize("seed", range(3))
def test_geometric_median_is_the_least_sum_of_distances(seed: int) -> None:
    deltas = _with_outlier(seed)[:, :40]
    found = GeometricMedian().coefficients(_gram(deltas)) @ deltas

    def distances(point: NDArray[np.float64]) -> float:
        return float(np.linalg.norm(deltas - point, axis=1).sum())

    best = minimize(distances, deltas.mean(axis=0), method="BFGS", options={"gtol": 1e-9})
    np.testing.assert_allclose(found, best.x, atol=1e-4)


def test_geometric_median_leaves_a_delta_that_it_only_began_at() -> None:
    # The mean is the first delta exactly; the median of these five points on a line is -1.
    points = np.array([[0.0], [-1], [-1], [-1], [3]])
    assert points.mean() == 0
    found = GeometricMedian().coefficients(_gram(points)) @ points
    assert found[0] == pytest.approx(-1, abs=1e-6)


def test_geometric_median_stays_at_most_deltas() -> None:
    deltas = _agreeing(0)
    deltas[:4] = deltas[0]
    found = GeometricMedian().coefficients(_gram(deltas))
    assert found[:4].sum() == pytest.approx(1, abs=1e-6)


def test_reweighted_pca_finds_the_axis_that_a_huge_delta_hides() -> None:
    found = ReweightedPca().coefficients(_gram(_with_outlier(0, size=30)))
    assert found[OUTLIER] < 0.001


def test_leave_one_out_floor_limits_how_much_one_may_weigh() -> None:
    gram = _gram(_with_outlier(0, size=4))
    mild, strict = (LeaveOneOut(floor=floor).coefficients(gram) for floor in (10.0, 0.001))
    assert mild.max() / mild.min() < 1.11
    assert strict.max() / strict.min() > 100


def test_leave_one_out_weighs_least_whom_alone_the_others_differ_from() -> None:
    deltas = _agreeing(0, num=5)
    deltas[:4] = deltas[0]
    found = LeaveOneOut().coefficients(_gram(deltas))  # without the last no PC1 is left
    np.testing.assert_allclose(found[:4], found[0])
    assert found[4] == pytest.approx(found[0] * 0.05 / 1.05)


def test_trimmed_mean_drops_the_fraction_it_is_given() -> None:
    gram = _gram(_with_outlier(4))
    for fraction, kept in ((0.0, 5), (0.2, 5), (0.4, 4), (0.5, 3)):
        found = TrimmedMean(fraction=fraction).coefficients(gram)
        assert np.count_nonzero(found) == kept
        assert found[OUTLIER] == 0


def test_winsorised_mean_keeps_what_lies_beside_pc1() -> None:
    deltas = _with_outlier(0)
    gram = _gram(deltas)
    consensus = WinsorisedMean().coefficients(gram) @ deltas
    direction = leading(gram, centred=True) @ deltas
    kept = np.delete(deltas @ direction, OUTLIER)
    bound = kept.max() if deltas[OUTLIER] @ direction > kept.max() else kept.min()
    assert consensus @ direction == pytest.approx((kept.sum() + bound) / NUM)
    beside = (consensus - deltas.mean(axis=0)) @ deltas.T
    along = (consensus - deltas.mean(axis=0)) @ direction * (direction @ deltas.T)
    np.testing.assert_allclose(beside, along, rtol=1e-6)


def test_hierarchical_counts_near_copies_once() -> None:
    deltas = _agreeing(0, num=5)
    noise = np.random.default_rng(9).standard_normal((2, WIDTH))
    deltas[1:3] = deltas[0] + 0.05 * noise
    found = Hierarchical(min_cosine=0.9, min_size=1).coefficients(_gram(deltas))
    np.testing.assert_allclose(found, [1 / 9, 1 / 9, 1 / 9, 1 / 3, 1 / 3])


@pytest.mark.parametrize("num", range(3, 12))
@pytest.mark.parametrize("cosine", [0.1, 0.3, 1 / 3, 0.7])
def test_hierarchical_of_equal_cosines_is_the_mean_whatever_the_sizes(
    num: int, cosine: float
) -> None:
    sizes = np.random.default_rng(num).uniform(0.1, 3, num)
    gram = (cosine + (1 - cosine) * np.eye(num)) * np.outer(sizes, sizes)
    np.testing.assert_allclose(Hierarchical().coefficients(gram), 1 / num)


def test_hierarchical_as_fm_words_it_gives_a_lone_outlier_a_cluster_of_its_own() -> None:
    gram = _gram(_with_outlier(0))
    assert Hierarchical(min_size=1).coefficients(gram)[OUTLIER] >= 0.25
    assert Hierarchical().coefficients(gram)[OUTLIER] == 0
