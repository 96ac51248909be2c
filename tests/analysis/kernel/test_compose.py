"""Specialists' kernels against the deltas that they are of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from analysis.family import StudiedFamily
from analysis.gram import gram_pass
from analysis.kernel.apply import kernel_delta
from analysis.kernel.combination import Combination, CombinedTensor
from analysis.kernel.compose import Composition, compose
from analysis.kernel.kernel import build_kernel
from analysis.selection import select
from linker_core.errors import InvalidRequestError
from tests.analysis.planted import Planted, Structure, plant_family


def _compose(family: StudiedFamily, specialists: Mapping[str, Sequence[str]]) -> Composition:
    grams = gram_pass(family, select(family.base))
    return compose(grams, specialists, names=family.names, seed=0)


def _values(family: StudiedFamily, kernel: Combination) -> NDArray[np.float64]:
    parts = [kernel_delta(family, kernel, name).ravel() for name in kernel.tensors]
    return np.concatenate(parts).astype(np.float64)


def test_sum_and_cosines_are_those_of_the_values(small_family: Planted) -> None:
    with small_family.open() as family:
        found = _compose(family, {"a": ["one", "three"], "b": ["five", "two", "four"]})
        a, b = (_values(family, kernel) for kernel in found.specialists.values())
        np.testing.assert_allclose(_values(family, found.together), a + b, atol=1e-6)
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert found.cosines["a", "b"] == pytest.approx(float(cosine), abs=1e-5)
    assert found.together.norm == pytest.approx(float(np.linalg.norm(a + b)), rel=1e-5)
    # Means of 2 and of 3 that share half of each: <a, b> = 1/2, |a|² = 3/4, |b|² = 2/3.
    expected = 0.5 / (0.75 * 2 / 3) ** 0.5
    for cosine in found.tensor_cosines["a", "b"].values():
        assert cosine == pytest.approx(expected, abs=1e-3)


def test_a_sum_says_nothing_of_how_one_of_its_kernels_was_found(small_family: Planted) -> None:
    with small_family.open() as family:
        found = _compose(family, {"a": ["one", "three"], "b": ["two"]})
    assert type(found.together) is Combination
    assert {type(tensor) for tensor in found.together.tensors.values()} == {CombinedTensor}
    assert found.together.names == small_family.names


def test_norms_of_a_specialists_raw_mean_are_those_of_its_values(small_family: Planted) -> None:
    with small_family.open() as family:
        found = _compose(family, {"a": ["one", "three"], "b": ["two"]})
        for kernel in found.specialists.values():
            mean = kernel.raw_mean()
            expected = float(np.linalg.norm(_values(family, mean)))
            assert mean.norm == pytest.approx(expected, rel=1e-5)


def test_a_specialist_of_several_is_their_own_kernel(small_family: Planted) -> None:
    with small_family.open() as family:
        found = _compose(family, {"a": ["one", "three"], "b": ["two"]}).specialists["a"]
        values = _values(family, found)
    part = Planted(
        base=small_family.base,
        variants={name: small_family.variants[name] for name in ("one", "three")},
        grams_NN={},
    )
    with part.open() as family:
        grams = gram_pass(family, select(family.base))
        alone = build_kernel(grams, names=family.names, seed=0)
        np.testing.assert_allclose(values, _values(family, alone), atol=1e-7)


def test_a_specialist_of_one_is_its_delta(small_family: Planted) -> None:
    with small_family.open() as family:
        found = _compose(family, {"a": ["four"], "b": ["two"]}).specialists["a"]
    for name, tensor in found.tensors.items():
        assert tensor.weight == pytest.approx(1, abs=1e-4)
        assert tensor.coefficients == pytest.approx((0, 0, 0, 1, 0))
        whole = float(small_family.grams_NN[name][3, 3]) ** 0.5
        assert tensor.norm == pytest.approx(whole, rel=1e-3)


def test_specialists_without_a_common_direction_do_not_meet(tmp_path: Path) -> None:
    planted = plant_family(tmp_path, Structure(num_variants=3, shared=0.0), layers=1)
    with planted.open() as family:
        found = _compose(family, {"a": ["one"], "b": ["two"], "c": ["three"]})
    assert set(found.cosines) == {("a", "b"), ("a", "c"), ("b", "c")}
    assert all(abs(cosine) < 1e-4 for cosine in found.cosines.values())
    norms = [kernel.norm for kernel in found.specialists.values()]
    assert found.together.norm == pytest.approx(np.linalg.norm(norms), rel=1e-4)


@pytest.mark.parametrize(
    ("specialists", "reason"),
    [
        ({"a": ["one"]}, "at least two specialists"),
        ({"a": ["one"], "b": []}, "at least two specialists"),
        ({"a": ["one"], "b": ["onne"]}, "'onne' is no fine-tune"),
        ({"a": ["one", "two"], "b": ["two"]}, "named twice"),
    ],
)
def test_specialists_that_make_no_sense_are_refused(
    specialists: dict[str, list[str]], reason: str
) -> None:
    with pytest.raises(InvalidRequestError, match=reason):
        compose([], specialists, names=("one", "two"), seed=0)
