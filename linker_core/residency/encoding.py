"""The delta of one matrix to its donor's, compressed: codes, low-rank factors, or both.

Legend: O rows, I width, c rows of a chunk, n rows that the donor lacks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from linker_core.residency.coding import CodedMatrix
from linker_core.residency.encoding_memory import CHUNK_WEIGHTS, sketch_size
from linker_core.residency.low_rank import (
    Factors,
    Product,
    rounded_factors,
    sketched,
)
from linker_core.residency.rounding import joined, rounded
from linker_core.residency.stored import StoredResidual, StoredTensor
from linker_core.sharing.rungs import Residual


class Rows(Protocol):
    """A matrix of which runs of rows can be had: a tensor, or one in a file."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __getitem__(self, rows: slice, /) -> torch.Tensor: ...


class DeltaEncoder:
    """Encodes one matrix's delta on any number of rungs.

    The same inputs give the same bytes on one machine with one number of torch's threads: another
    library of linear algebra may round factors another way, and so may other shares of its sums.

    What was sketched of the delta serves all ranks up to the next power of two. Besides it and what
    is returned, memory holds a chunk of rows in float32.

    Args:
        base: What the results are to; the donor's matrix.
        variant_OI: The variant's, of any float type, and of as many columns.
        seed: Of the sketch's directions.
        base_OI: The donor's matrix where `base` does not hold it.
    """

    def __init__(
        self,
        base: StoredTensor,
        variant_OI: Rows,
        *,
        seed: int = 0,
        base_OI: Rows | None = None,
    ) -> None:
        self._base_OI: Rows = base.tensor if base_OI is None else base_OI
        assert len(variant_OI.shape) == 2
        assert self._base_OI.shape[1] == variant_OI.shape[1]
        self._base = base
        self._rows = min(self._base_OI.shape[0], variant_OI.shape[0])
        self._variant_OI = variant_OI
        self._seed = seed
        self._sketches: dict[int, Product] = {}

    def encode(self, rung: Residual) -> StoredResidual:
        """Returns the delta on a rung, where the donor's matrix lies.

        Raises:
            BadCheckpointError: The delta is not finite.
        """
        factors = None
        if rung.rank:
            factors = rounded_factors(
                self._sketch(rung.rank), rank=rung.rank, bits=rung.factor_bits
            )
        extra_nI = self._variant_OI[self._rows :].to(self._base.tensor.device)
        return StoredResidual(
            base=self._base,
            dense=self._codes(rung, factors) if rung.bits else None,
            down=factors.down if factors else None,
            up=factors.up if factors else None,
            extra=extra_nI.clone(),
        )

    def _codes(self, rung: Residual, factors: Factors | None) -> CodedMatrix:
        """Rounds what the rounded factors leave of the delta."""
        down_rI, up_rO = (part.decoded() for part in factors) if factors else (None, None)
        parts: list[CodedMatrix] = []
        first = 0
        for delta_cI in self._chunks():
            end = first + len(delta_cI)
            if down_rI is not None and up_rO is not None:
                delta_cI.addmm_(up_rO[:, first:end].T, down_rI, alpha=-1)
            parts.append(rounded(delta_cI, bits=rung.bits, group=rung.group))
            first = end
        return joined(parts)

    def _sketch(self, rank: int) -> Product:
        width = self._base_OI.shape[1]
        columns = min(sketch_size(rank), self._rows, width)
        if columns not in self._sketches:
            self._sketches[columns] = sketched(
                self._chunks,
                width,
                columns=columns,
                seed=self._seed,
                device=self._base.tensor.device,
            )
        return self._sketches[columns]

    def _chunks(self) -> Iterator[torch.Tensor]:
        """Yields runs of rows of the delta, float32."""
        device = self._base.tensor.device
        step = max(1, CHUNK_WEIGHTS // self._base_OI.shape[1])
        for first in range(0, self._rows, step):
            rows = slice(first, min(first + step, self._rows))
            variant_cI = self._variant_OI[rows].to(device)
            yield variant_cI.float() - self._base_OI[rows].to(device).float()
