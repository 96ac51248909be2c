"""The plain path beside the Gram pass: all deltas stacked in memory, in wider arithmetic."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from analysis.family import StudiedFamily
from analysis.tensors import read_tensor

Floats = npt.NDArray[np.float64]


class PlainGram(NamedTuple):
    """What `TensorGram` holds, and the stack it came from."""

    base_square: float
    base_dots_N: Floats
    gram_NN: Floats
    deltas_ND: Floats


def plain_gram(family: StudiedFamily, name: str) -> PlainGram:
    """Returns the products of one tensor."""
    base_D, *variants = (
        read_tensor(c, name).ravel().astype(np.float64) for c in family.checkpoints
    )
    return products_of(base_D, np.stack([variant_D - base_D for variant_D in variants]))


def products_of(base_D: Floats, deltas_ND: Floats) -> PlainGram:
    """Returns the products of a base and deltas; numpy's longdouble has 64 bits of mantissa."""
    wide_ND, wide_D = deltas_ND.astype(np.longdouble), base_D.astype(np.longdouble)
    return PlainGram(
        base_square=float(wide_D @ wide_D),
        base_dots_N=(wide_ND @ wide_D).astype(np.float64),
        gram_NN=(wide_ND @ wide_ND.T).astype(np.float64),
        deltas_ND=deltas_ND,
    )
