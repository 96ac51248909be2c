from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linker_core.tuning.fit import FitPoint, fit

NAMES = ("a", "b", "c", "d")
# Few distinct numbers, so that sums and worst values are often equal.
points = st.builds(FitPoint, st.integers(0, 12), st.integers(0, 8).map(float))
frontiers = st.lists(st.lists(points, min_size=1, max_size=4), min_size=1, max_size=4).map(
    lambda lists: dict(zip(NAMES, lists, strict=False))
)


def brute_force(frontiers: list[list[FitPoint]], budget: int) -> tuple[float, float, int] | None:
    """Worst KL, sum of KLs and bytes of the best of all choices."""
    sums = [
        (max(p.kl for p in choice), sum(p.kl for p in choice), sum(p.unique_bytes for p in choice))
        for choice in product(*frontiers)
    ]
    return min((found for found in sums if found[2] <= budget), default=None)


@given(frontiers=frontiers, budget=st.integers(0, 50))
def test_choice_is_the_best_of_all(frontiers: dict[str, list[FitPoint]], budget: int) -> None:
    found = fit(frontiers, budget)
    want = brute_force(list(frontiers.values()), budget)
    assert found.fits == (want is not None)
    chosen = [frontiers[name][place] for name, place in found.chosen.items()]
    assert found.unique_bytes == sum(point.unique_bytes for point in chosen) <= budget
    assert {*found.chosen, *found.left_out} == frontiers.keys()
    if want is not None:
        kls = [point.kl for point in chosen]
        assert (max(kls), sum(kls), found.unique_bytes) == want


@given(frontiers=frontiers, budget=st.integers(0, 50))
def test_as_many_are_kept_as_can_be(frontiers: dict[str, list[FitPoint]], budget: int) -> None:
    found = fit(frontiers, budget)
    least = {name: min(p.unique_bytes for p in points) for name, points in frontiers.items()}
    assert found.least_bytes == sum(least.values())
    assert found.fits == (found.least_bytes <= budget)
    smallest = sorted(least.values())
    most = max(n for n in range(len(smallest) + 1) if sum(smallest[:n]) <= budget)
    assert len(found.chosen) == most


def test_the_worst_comes_before_the_mean() -> None:
    even = [FitPoint(1, 0.05), FitPoint(2, 0.04)]
    steep = [FitPoint(1, 0.9), FitPoint(2, 0.06)]
    found = fit({"even": even, "steep": steep}, 3)
    assert found.chosen == {"even": 0, "steep": 1}
    assert fit({"even": even, "steep": steep}, 4).chosen == {"even": 1, "steep": 1}


def test_the_one_that_does_not_fit_is_named() -> None:
    small, large = [FitPoint(3, 0.1), FitPoint(5, 0.0)], [FitPoint(9, 0.2)]
    found = fit({"large": large, "small": small}, 10)
    assert (found.left_out, found.least_bytes, found.fits) == (("large",), 12, False)
    assert found.chosen == {"small": 1}


@pytest.mark.parametrize("budget", [0, 7])
def test_nobody_needs_nothing(budget: int) -> None:
    assert fit({}, budget).chosen == {}


def test_many_variants_of_many_points_are_no_trouble() -> None:
    curve = [FitPoint(2**i, 1.0 / (3**i + number)) for i in range(10) for number in range(3)]
    found = fit({str(number): curve for number in range(16)}, 16 * 300)
    assert found.fits
    assert found.unique_bytes <= 16 * 300
