"""The kernel's plain path: numpy decodes, math.fsum adds exactly."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class Sums(NamedTuple):
    """What the kernel writes, in its order."""

    dot: float
    donor_square: float
    variant_square: float
    delta_square: float


def plain_sums(a: npt.NDArray[Any], b: npt.NDArray[Any], types: tuple[str, str]) -> Sums:
    """Returns the sums of two tensors given as raw words."""
    x, y = (decoded(words, dtype) for words, dtype in zip((a, b), types, strict=True))
    delta = x - y  # at most one rounding to 64 bits of mantissa
    return Sums(*(_total(product) for product in (x * y, x * x, y * y, delta * delta)))


def decoded(words: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.longdouble]:
    """Returns words as numbers."""
    if dtype == "BF16":
        return (words.astype(np.uint32) << 16).view(np.float32).astype(np.longdouble)
    return words.view({"F16": np.float16, "F32": np.float32}[dtype]).astype(np.longdouble)


def _total(products: Iterable[np.longdouble]) -> float:
    return math.fsum(float(product) for product in products)
