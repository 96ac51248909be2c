"""Low-rank factors of a matrix that is only seen in runs of rows, and their rounding.

Legend: O rows, I width, r rank, k columns of a sketch, c rows of a run, m terms of a sum of outer
products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from linker_core.residency.coding import CodedMatrix
from linker_core.residency.rounding import joined, rounded
from linker_core.sharing.rungs import factor_group

Runs = Callable[[], Iterator[torch.Tensor]]  # each call yields the matrix, float32 [c, I]

_ITERATIONS = 2
_OVERSAMPLES = 16  # directions that a sketch has above the rank
_LEAST_SKETCH = 16
_BLOCK = 16  # rows of 4-bit factors that are rounded before the next are chosen


class Product(NamedTuple):
    """left @ right."""

    left_Om: torch.Tensor
    right_mI: torch.Tensor


class Factors(NamedTuple):
    """upᵀ down."""

    down: CodedMatrix  # [r, I]
    up: CodedMatrix  # [r, O]


def sketch_size(rank: int) -> int:
    """Returns how many directions a sketch for a rank has; few sizes serve all ranks."""
    return max(_LEAST_SKETCH, 1 << (rank - 1).bit_length()) + _OVERSAMPLES


def sketched(runs: Runs, width: int, *, columns: int, seed: int, device: torch.device) -> Product:
    """Returns the greatest singular triples, by a randomised range finder.

    Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1, on the side of the rows: each
    iteration takes the range of DᵀD times the one before, so that D is never transposed, and a
    pass sees each run once.

    Args:
        runs: Of the matrix D [O, I].
        width: I.
        columns: k.
        seed: Of the first directions.
        device: Where the runs lie.
    """
    generator = torch.Generator().manual_seed(seed)
    range_Ik = torch.randn((width, columns), generator=generator).to(device)
    for _ in range(_ITERATIONS):
        image_Ik = torch.zeros_like(range_Ik)
        for run_cI in runs():
            image_Ik.addmm_(run_cI.T, run_cI @ range_Ik)
        range_Ik = torch.linalg.qr(image_Ik)[0]
    image_Ok = torch.cat([run_cI @ range_Ik for run_cI in runs()])
    return _triples(Product(image_Ok, range_Ik.T))


def rounded_factors(found: Product, *, rank: int, bits: int) -> Factors:
    """Rounds the factors nearest to a matrix.

    In 4 bits, block after block: each is chosen with what the rounding of those before it left.
    Within a block `up` is what fits best once `down` is rounded.

    Args:
        found: The matrix' greatest singular triples.
        rank: r.
        bits: Of an element.
    """
    block = _BLOCK if bits == 4 else rank
    downs: list[CodedMatrix] = []
    ups: list[CodedMatrix] = []
    left_over = found
    for first in range(0, rank, block):
        triples = _triples(left_over) if first else found
        down = _rounded_right(triples, min(block, rank - first), bits)
        kept_rI = down.decoded()
        dots_rr = kept_rI @ kept_rI.T
        image_Or = left_over.left_Om @ (left_over.right_mI @ kept_rI.T)
        # Rows that were rounded to nothing, as where the rank is above the matrix' own, stay out.
        up_rO = torch.linalg.pinv(dots_rr, hermitian=True) @ image_Or.T
        up = rounded(up_rO, bits=bits, group=factor_group(up_rO.shape[1], bits))
        downs.append(down)
        ups.append(up)
        left_over = Product(
            torch.cat([left_over.left_Om, -up.decoded().T], dim=1),
            torch.cat([left_over.right_mI, kept_rI]),
        )
    return Factors(joined(downs), joined(ups))


def _rounded_right(triples: Product, rank: int, bits: int) -> CodedMatrix:
    """Rounds the first singular directions; each side takes half of a singular value."""
    left_Or, right_rI = triples.left_Om[:, :rank], triples.right_mI[:rank]
    down_rI = right_rI.new_zeros(rank, right_rI.shape[1])  # zeros: no more directions
    down_rI[: len(right_rI)] = right_rI * left_Or.norm(dim=0).sqrt().unsqueeze(1)
    return rounded(down_rI, bits=bits, group=factor_group(down_rI.shape[1], bits))


def _triples(product: Product) -> Product:
    """Returns the same product with orthonormal rows at the right, the greatest first."""
    left_Op, left_pm = torch.linalg.qr(product.left_Om)
    right_Iq, right_qm = torch.linalg.qr(product.right_mI.T)
    inner, values, outer = torch.linalg.svd(left_pm @ right_qm.T, full_matrices=False)
    return Product(left_Op @ (inner * values), outer @ right_Iq.T)
