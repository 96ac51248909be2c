"""The delta of one matrix to its donor's, compressed: codes, low-rank factors, or both.

Legend: O rows, I width, r rank, k columns of a sketch, c rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from linker_core.residency.coding import CodedMatrix
from linker_core.residency.ledger import StoredResidual, StoredTensor
from linker_core.residency.rounding import joined, rounded
from linker_core.sharing.rungs import Residual, factor_group

_CHUNK_WEIGHTS = 1 << 18  # encoded at a time: 1 MiB in float32
_OVERSAMPLES = 16  # directions that a sketch has above the rank
_SKETCH_UNIT = 32  # ranks that need as many of these share a sketch


class _Factors(NamedTuple):
    """The delta's greatest singular triples, up to a sketch's size."""

    left_Ok: torch.Tensor  # times the singular values
    right_kI: torch.Tensor  # orthonormal rows


class DeltaEncoder:
    """Encodes one matrix's delta on any number of rungs; the same inputs give the same bytes.

    Factors are found once for all ranks that share a sketch. Besides them memory holds a chunk of
    rows in float32.

    Args:
        base: The donor's matrix.
        variant_OI: The variant's, of any float type, and of as many columns.
        seed: Of the sketch's directions.
    """

    def __init__(self, base: StoredTensor, variant_OI: torch.Tensor, *, seed: int = 0) -> None:
        assert variant_OI.dim() == 2
        assert base.tensor.shape[1] == variant_OI.shape[1]
        self._base = base
        self._rows = min(base.num_rows, len(variant_OI))
        self._variant_OI = variant_OI
        self._seed = seed
        self._sketches: dict[int, _Factors] = {}

    def encode(self, rung: Residual) -> StoredResidual:
        """Returns the delta on a rung, where the donor's matrix lies.

        Raises:
            BadCheckpointError: The delta is not finite.
        """
        down, up = self._factors(rung) if rung.rank else (None, None)
        dense = self._codes(rung, down, up) if rung.bits else None
        extra_nI = self._variant_OI[self._rows :].to(self._base.tensor.device)
        return StoredResidual(
            base=self._base, dense=dense, down=down, up=up, extra=extra_nI.clone()
        )

    def _factors(self, rung: Residual) -> tuple[CodedMatrix, CodedMatrix]:
        """Rounds the factors: `up` is what fits the delta best once `down` is rounded."""
        found = self._sketch(rung.rank)
        bits = rung.factor_bits
        # Each side takes half of a singular value; a rank above the matrix' own leaves rows at 0.
        root_r1 = found.left_Ok[:, : rung.rank].norm(dim=0).sqrt().unsqueeze(1)
        down_rI = found.right_kI.new_zeros(rung.rank, found.right_kI.shape[1])
        down_rI[: len(root_r1)] = found.right_kI[: rung.rank] * root_r1
        down = rounded(down_rI, bits=bits, group=factor_group(down_rI.shape[1], bits))
        kept_rI = down.decoded()
        seen_kr = found.right_kI @ kept_rI.T
        # Directions that are rounded to nothing, as where the delta's rank is below r, stay out.
        up_rO = torch.linalg.pinv(kept_rI @ kept_rI.T, hermitian=True) @ (found.left_Ok @ seen_kr).T
        return down, rounded(up_rO, bits=bits, group=factor_group(self._rows, bits))

    def _codes(
        self, rung: Residual, down: CodedMatrix | None, up: CodedMatrix | None
    ) -> CodedMatrix:
        """Rounds what the factors leave of the delta."""
        down_rI, up_rO = (None if part is None else part.decoded() for part in (down, up))
        parts = []
        for first, delta_cI in self._chunks():
            if down_rI is not None and up_rO is not None:
                delta_cI.addmm_(up_rO[:, first : first + len(delta_cI)].T, down_rI, alpha=-1)
            parts.append(rounded(delta_cI, bits=rung.bits, group=rung.group))
        return joined(parts)

    def _sketch(self, rank: int) -> _Factors:
        """Finds singular triples by a randomised range finder (Halko et al. 2011, 4.4 and 5.1).

        Two rounds of subspace iteration on the rows' side: the delta has its range in
        (DᵀD)² omega, which is orthonormalised between them.
        """
        columns = -(-rank // _SKETCH_UNIT) * _SKETCH_UNIT + _OVERSAMPLES
        columns = min(columns, self._rows, self._variant_OI.shape[1])
        if columns not in self._sketches:
            generator = torch.Generator().manual_seed(self._seed)
            width = self._variant_OI.shape[1]
            device = self._base.tensor.device
            range_Ik = torch.randn((width, columns), generator=generator).to(device)
            for _ in range(2):
                image_Ik = torch.zeros_like(range_Ik)
                for _first, delta_cI in self._chunks():
                    image_Ik.addmm_(delta_cI.T, delta_cI @ range_Ik)
                range_Ik = torch.linalg.qr(image_Ik)[0]
            image_Ok = torch.cat([delta_cI @ range_Ik for _first, delta_cI in self._chunks()])
            left, values, right = torch.linalg.svd(image_Ok, full_matrices=False)
            self._sketches[columns] = _Factors(left * values, right @ range_Ik.T)
        return self._sketches[columns]

    def _chunks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields runs of rows of the delta, float32, each with the index of its first."""
        base_OI = self._base.tensor
        step = max(1, _CHUNK_WEIGHTS // base_OI.shape[1])
        for first in range(0, self._rows, step):
            rows = slice(first, min(first + step, self._rows))
            variant_cI = self._variant_OI[rows].to(base_OI.device)
            yield first, variant_cI.float() - base_OI[rows].float()
