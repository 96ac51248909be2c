"""A kernel's values, from the weights themselves: w_t Σ c_i Δ_i of one tensor (FM Eq. 4).

Summed in float64 over runs of elements, so memory is a few runs beside what the caller asks for.
Legend: D elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from analysis.family import StudiedFamily
from analysis.kernel.combination import Combination
from analysis.tensors import read_runs
from linker_core.errors import InvalidRequestError

_RUN_ELEMENTS = 1 << 18


def kernel_delta(family: StudiedFamily, kernel: Combination, name: str) -> NDArray[np.float32]:
    """Returns K_t in the tensor's shape.

    Args:
        family: Holds the kernel's base and fine-tunes, open.
        kernel: Of this family.
        name: One of the kernel's tensors.

    Raises:
        BadCheckpointError: A file became shorter, or the disk failed.
        InvalidRequestError: The weights are so large that their kernel leaves float32's range.
    """
    shape = family.base.tensors[name].shape
    values = np.empty(math.prod(shape), np.float32)
    start = 0
    for _, delta in kernel_runs(family, kernel, name):
        with np.errstate(over="ignore"):
            values[start : start + delta.size] = delta
        start += delta.size
    if not np.isfinite(values).all():
        raise InvalidRequestError(
            f"{name}: the kernel leaves the range of float32, since weights are near its ends. "
            "Choose other tensors, or leave the fine-tune with such weights out."
        )
    return values.reshape(shape)


def kernel_runs(
    family: StudiedFamily, kernel: Combination, name: str
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float64]]]:
    """Yields runs of a tensor, flat: the base's values, and the kernel's in float64."""
    tensor = kernel.tensors[name]
    shares = [
        (family.variants[variant], tensor.weight * c)
        for variant, c in zip(kernel.names, tensor.coefficients, strict=True)
        if c != 0
    ]
    tuned = [read_runs(one, name, run_elements=_RUN_ELEMENTS) for one, _ in shares]
    for base_D in read_runs(family.base, name, run_elements=_RUN_ELEMENTS):
        wide_D, kernel_D = base_D.astype(np.float64), np.zeros(base_D.size)
        for runs, (_, share) in zip(tuned, shares, strict=True):
            kernel_D += share * (next(runs) - wide_D)
        yield base_D, kernel_D
