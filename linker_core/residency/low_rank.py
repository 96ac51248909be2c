"""Low-rank factors of a matrix that is only seen in runs of rows, and their rounding.

Legend: O rows, I width, r rank, k columns of a sketch, c rows of a run, m terms of a sum of outer
products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from linker_core.residency.coding import CodedMatrix
from linker_core.residency.encoding_memory import OVERSAMPLES
from linker_core.residency.rounding import check_finite, joined, rounded
from linker_core.sharing.rungs import factor_group

Runs = Callable[[], Iterator[torch.Tensor]]  # each call yields the matrix, float32 [c, I]

_ITERATIONS = 2
_BLOCK = 16  # rows of 4-bit factors that are rounded before the next are chosen


class Product(NamedTuple):
    """left @ right."""

    left_Om: torch.Tensor
    right_mI: torch.Tensor

    def times(self, range_Ik: torch.Tensor) -> torch.Tensor:
        """Returns left @ right @ range."""
        return self.left_Om @ (self.right_mI @ range_Ik)

    def transposed_times(self, image_Ok: torch.Tensor) -> torch.Tensor:
        """Returns (left @ right)ᵀ @ image."""
        return self.right_mI.T @ (self.left_Om.T @ image_Ok)


class Factors(NamedTuple):
    """upᵀ down."""

    down: CodedMatrix  # [r, I]
    up: CodedMatrix  # [r, O]


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

    Raises:
        BadCheckpointError: A value is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    range_Ik = torch.randn((width, columns), generator=generator).to(device)
    for _ in range(_ITERATIONS):
        image_Ik = torch.zeros_like(range_Ik)
        for run_cI in runs():
            image_Ik.addmm_(run_cI.T, run_cI @ range_Ik)
        check_finite(image_Ik)  # every value of the matrix is in it
        range_Ik = torch.linalg.qr(image_Ik)[0]
    image_Ok = torch.cat([run_cI @ range_Ik for run_cI in runs()])
    left_Ok, inner_kk = torch.linalg.qr(image_Ok)
    left_kk, values_k, right_kk = torch.linalg.svd(inner_kk)
    return Product(left_Ok @ (left_kk * values_k), right_kk @ range_Ik.T)


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
        size = min(block, rank - first)
        right_rI = _leading(left_over, size) if first else _weighted(found, size)
        down_rI = right_rI.new_zeros(size, right_rI.shape[1])
        down_rI[: len(right_rI)] = right_rI  # where there are fewer directions, zeros follow
        down = rounded(down_rI, bits=bits, group=factor_group(down_rI.shape[1], bits))
        kept_rI = down.decoded()
        # Rows that were rounded to nothing stay out of the inverse.
        inverse_rr = torch.linalg.pinv(kept_rI @ kept_rI.T, hermitian=True)
        up_rO = (left_over.times(kept_rI.T) @ inverse_rr).T.contiguous()
        up = rounded(up_rO, bits=bits, group=factor_group(up_rO.shape[1], bits))
        downs.append(down)
        ups.append(up)
        left_over = Product(
            torch.cat([left_over.left_Om, -up.decoded().T], dim=1),
            torch.cat([left_over.right_mI, kept_rI]),
        )
    return Factors(joined(downs), joined(ups))


def _weighted(found: Product, rank: int) -> torch.Tensor:
    """Returns the first right directions [r, I], each times the root of its singular value."""
    values_r = found.left_Om[:, :rank].norm(dim=0)
    right_rI: torch.Tensor = found.right_mI[:rank] * values_r.sqrt().unsqueeze(1)
    return right_rI


def _leading(product: Product, rank: int) -> torch.Tensor:
    """Returns the same of a product whose singular triples are not known."""
    width = product.right_mI.shape[1]
    generator = torch.Generator().manual_seed(product.right_mI.shape[0])
    columns = min(rank + OVERSAMPLES, width)
    range_Ik = torch.randn((width, columns), generator=generator).to(product.right_mI.device)
    for _ in range(_ITERATIONS):
        image_Ik = product.transposed_times(product.times(range_Ik))
        range_Ik = torch.linalg.qr(image_Ik)[0]
    image_Ok = product.times(range_Ik)
    squares_k, directions_kk = torch.linalg.eigh(image_Ok.T @ image_Ok)
    values_r = squares_k[-rank:].clamp(min=0).sqrt()
    right_Ir: torch.Tensor = range_Ik @ (directions_kk[:, -rank:] * values_r.sqrt())
    return right_Ir.T.flip(0)
