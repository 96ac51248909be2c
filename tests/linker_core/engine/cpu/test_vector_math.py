from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from llvmlite import ir

from linker_core.engine.cpu.emitter import F32, POINTER, Emitter, vector
from linker_core.engine.cpu.vector_math import exponential, normal_cdf, sigmoid, tanh
from tests.linker_core.engine.cpu.compiled import compiled, record, run

_LANES = 8
_TASK = ("x", "y", "count")
Floats = npt.NDArray[np.float32]
_FUNCTIONS = {
    "exponential": exponential,
    "sigmoid": sigmoid,
    "tanh": tanh,
    "normal_cdf": normal_cdf,
}


def _emit(module: ir.Module) -> None:
    for name, function in _FUNCTIONS.items():
        e = Emitter(module, name, [POINTER])
        (task,) = e.arguments
        x, y = e.field(task, 0, POINTER), e.field(task, 1, POINTER)
        with e.loop(0, e.field(task, 2), _LANES) as k:
            given = e.load(e.at(x, k, F32), vector(F32, _LANES))
            e.store(function(e, given), e.at(y, k, F32))
        e.finish()


@pytest.fixture(scope="module")
def compute() -> Callable[[str, Floats], Floats]:
    code = compiled(_emit)

    def applied(name: str, x: Floats) -> Floats:
        padded = np.zeros(-(-len(x) // _LANES) * _LANES, dtype=np.float32)
        padded[: len(x)] = x
        y = np.empty_like(padded)
        task = record(_TASK, x=padded.ctypes.data, y=y.ctypes.data, count=len(padded))
        run(code, name, task)
        return y[: len(x)]

    return applied


def _units(found: Floats, expected: npt.NDArray[np.float64]) -> float:
    """Returns the largest error in units of the last place."""
    spacing = np.spacing(np.abs(expected.astype(np.float32))).astype(np.float64)
    return float((np.abs(found - expected) / spacing).max())


def test_exponential_is_right_to_about_one_unit_over_the_whole_range(
    compute: Callable[[str, Floats], Floats],
) -> None:
    x = np.linspace(-87.29, 88.71, 1_000_003).astype(np.float32)
    assert _units(compute("exponential", x), np.exp(x.astype(np.float64))) <= 1.1


def test_exponential_of_special_numbers_is_exact(
    compute: Callable[[str, Floats], Floats],
) -> None:
    x = np.array([0.0, -0.0, -np.inf, -100.0, -3e38, np.inf, 89.0, 3e38], dtype=np.float32)
    expected = [1.0, 1.0, 0.0, 0.0, 0.0, np.inf, np.inf, np.inf]
    assert compute("exponential", x).tolist() == expected


@pytest.mark.parametrize("name", list(_FUNCTIONS))
def test_a_nan_stays_one_and_leaves_the_other_lanes(
    compute: Callable[[str, Floats], Floats], name: str
) -> None:
    x = np.array([1.0, np.nan, -2.0, -np.nan], dtype=np.float32)
    found = compute(name, x)
    assert np.isnan(found).tolist() == [False, True, False, True]
    assert found[0] == compute(name, x[:1])[0]


def test_exponential_of_a_nan_with_bits_of_its_own_stays_one(
    compute: Callable[[str, Floats], Floats],
) -> None:
    bits = np.array([0x7FC00001, 0x7FC001FF, 0xFFC00080, 0x7F800001], dtype=np.uint32)
    assert np.isnan(compute("exponential", bits.view(np.float32))).all()


def test_sigmoid_is_right_to_three_units_and_saturates(
    compute: Callable[[str, Floats], Floats],
) -> None:
    x = np.linspace(-87.0, 88.0, 300_001).astype(np.float32)
    assert _units(compute("sigmoid", x), 1.0 / (1.0 + np.exp(-x.astype(np.float64)))) <= 3.0
    ends = np.array([-np.inf, -3e38, 3e38, np.inf], dtype=np.float32)
    assert compute("sigmoid", ends).tolist() == [0.0, 0.0, 1.0, 1.0]


def test_tanh_is_right_to_four_units_from_the_smallest_to_the_largest(
    compute: Callable[[str, Floats], Floats],
) -> None:
    sizes = np.concatenate([np.logspace(-30, 1.3, 200_001), np.linspace(0, 12, 200_001)])
    x = np.concatenate([sizes, -sizes]).astype(np.float32)
    assert _units(compute("tanh", x), np.tanh(x.astype(np.float64))) <= 4.0
    ends = np.array([-np.inf, -3e38, -0.0, 0.0, 3e38, np.inf], dtype=np.float32)
    found = compute("tanh", ends)
    assert found.tolist() == [-1.0, -1.0, 0.0, 0.0, 1.0, 1.0]
    assert np.signbit(found).tolist() == [True, True, True, False, False, False]


def test_normal_cdf_is_the_share_below(compute: Callable[[str, Floats], Floats]) -> None:
    x = np.linspace(-12.0, 12.0, 48_001).astype(np.float32)
    exact = np.array([0.5 * math.erfc(-float(v) / math.sqrt(2.0)) for v in x])
    found = compute("normal_cdf", x)
    middle = np.abs(x) <= 4
    assert _units(found[middle], exact[middle]) <= 16.0
    # Beyond, the rounding of x² / 2 is what counts.
    assert (np.abs(found - exact) / exact <= 1e-7 * (8 + x.astype(np.float64) ** 2)).all()
    ends = np.array([-np.inf, -3e38, -0.0, 0.0, 3e38, np.inf], dtype=np.float32)
    assert compute("normal_cdf", ends).tolist() == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
