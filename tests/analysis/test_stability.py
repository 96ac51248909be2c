"""The jackknife against decompositions of the deltas themselves."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.stability import Role, leave_one_out, role_of
from tests.analysis.test_pca import Floats, prepared, stack


def first(x_ND: Floats, *, centred: bool) -> tuple[Floats, float]:
    """PC1's direction [D] and its share."""
    y_ND = prepared(x_ND, centred=centred, normalised=False)
    _, singular_N, right_ND = np.linalg.svd(y_ND, full_matrices=False)
    return right_ND[0], float(singular_N[0] ** 2 / np.sum(singular_N**2))


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_leave_one_out_is_that_of_the_deltas(seed: int, *, centred: bool) -> None:
    x_ND = stack(seed, 5)
    whole_D, whole = first(x_ND, centred=centred)

    found = leave_one_out(x_ND @ x_ND.T, centred=centred)

    assert found is not None
    for dropped in range(5):
        part_D, part = first(np.delete(x_ND, dropped, axis=0), centred=centred)
        assert found.cosines[dropped] == pytest.approx(abs(float(part_D @ whole_D)), abs=1e-8)
        assert found.pc1_shifts[dropped] == pytest.approx(part - whole, abs=1e-8)


def test_leave_one_out_of_one_heavy_fine_tune_finds_it_alone_in_the_periphery() -> None:
    x_ND = np.diag([30.0, 3.0, 1.5, 1.0, 0.5])  # unrelated

    found = leave_one_out(x_ND @ x_ND.T, centred=True)

    assert found is not None
    cosines = [cosine for cosine in found.cosines if cosine is not None]
    assert cosines[0] < 0.05
    assert min(cosines[1:]) > 0.99
    roles = [role_of([cosine]) for cosine in cosines]
    assert roles == [Role.PERIPHERY, *[Role.CORE] * 4]


def test_leave_one_out_of_unrelated_equals_shifts_by_what_fewer_of_them_share() -> None:
    found = leave_one_out(np.eye(5), centred=True)

    assert found is not None
    assert found.pc1_shifts == pytest.approx([1 / 3 - 1 / 4] * 5)


@pytest.mark.parametrize(("num_models", "centred"), [(3, True), (2, True), (2, False), (1, False)])
def test_leave_one_out_with_too_few_is_none(num_models: int, *, centred: bool) -> None:
    assert leave_one_out(np.eye(num_models), centred=centred) is None


def test_leave_one_out_with_three_uncentred_is_there() -> None:
    found = leave_one_out(np.diag([9.0, 4.0, 1.0]), centred=False)

    assert found is not None
    assert found.cosines == pytest.approx((0.0, 1.0, 1.0))
    assert found.pc1_shifts == pytest.approx((4 / 5 - 9 / 14, 9 / 10 - 9 / 14, 9 / 13 - 9 / 14))


def test_leave_one_out_without_variance_has_no_numbers() -> None:
    found = leave_one_out(np.ones((4, 4)), centred=True)

    assert found is not None
    assert found.cosines == (None,) * 4
    assert found.pc1_shifts == (None,) * 4


def test_role_without_a_cosine_is_none() -> None:
    assert role_of([]) is None
