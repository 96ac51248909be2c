"""Alignment of planted deltas whose cosine and norms are known."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from analysis.transfer.alignment import aligned, alignment


def planted(cos: float, norm: float, *, seed: int = 0) -> tuple[NDArray[np.float32], ...]:
    """Returns a kernel of norm 3 and a mean delta at a given cosine to it, of a given norm."""
    rng = np.random.default_rng(seed)
    a, b = np.linalg.qr(rng.standard_normal((24, 2)))[0].T
    mean = norm * (cos * a + np.sqrt(1 - cos**2) * b)
    return (3 * a).astype(np.float32).reshape(4, 6), mean.astype(np.float32).reshape(4, 6)


@pytest.mark.parametrize("cos", [-0.9, -0.1, 0.1, 0.9])
def test_alignment_of_planted_deltas_finds_cosine_sign_and_norms(cos: float) -> None:
    found = alignment(*planted(cos, 0.5))
    assert found.cos == pytest.approx(cos, abs=1e-6)
    assert found.flipped == (cos < 0)
    assert found.source_norm == pytest.approx(3, rel=1e-6)
    assert found.target_norm == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("cos", [-0.7, 0.7])
def test_aligned_kernel_correlates_with_the_target_and_has_its_norm(cos: float) -> None:
    kernel, mean = planted(cos, 0.5)
    moved = aligned(kernel, alignment(kernel, mean))
    assert np.vdot(moved, mean) / (0.5 * 0.5) == pytest.approx(0.7, abs=1e-6)
    assert np.linalg.norm(moved) == pytest.approx(0.5, rel=1e-6)
    # Only sign and size changed: it is still the source's direction.
    assert np.vdot(moved, kernel) / (0.5 * 3) == pytest.approx(np.sign(cos), abs=1e-6)


def test_aligned_kernel_does_not_depend_on_the_kernels_weight() -> None:
    kernel, mean = planted(0.3, 2.0)
    scaled = kernel * np.float32(0.125)
    np.testing.assert_array_equal(
        aligned(kernel, alignment(kernel, mean)), aligned(scaled, alignment(scaled, mean))
    )


def test_alignment_of_uncorrelated_deltas_flips_nothing() -> None:
    kernel, mean = (np.array([values], np.float32) for values in ([1, 0], [0, 2]))
    found = alignment(kernel, mean)
    assert (found.cos, found.flipped, found.factor) == (0.0, False, 2.0)


def test_alignment_with_a_target_that_did_not_move_leaves_nothing() -> None:
    kernel, mean = planted(0.5, 1.0)
    found = alignment(kernel, np.zeros_like(mean))
    assert found.cos == 0
    assert not aligned(kernel, found).any()


def test_alignment_of_a_zero_kernel_is_zero_whatever_the_target() -> None:
    kernel, mean = planted(-0.5, 1.0)
    zero = np.zeros_like(kernel)
    found = alignment(zero, mean)
    assert (found.factor, found.flipped) == (0.0, False)
    assert not aligned(zero, found).any()
