"""By how much a rung misses some rows of a matrix, without encoding the others.

Codes of a row depend on that row and on the factors alone, so the rows' errors are those of the
whole. Legend: n rows that are picked, I width.
"""

from __future__ import annotations

import torch

from linker_core.residency.encoding import DeltaEncoder
from linker_core.residency.stored import StoredResidual, StoredTensor
from linker_core.sharing.rungs import AnyRung, Residual, Rung
from linker_core.tuning.storages import SectionReader


class RowErrors:
    """Of one matrix.

    Args:
        reader: Of the pair.
        name: Of the matrix.
        rows: Which rows, int64 [n].
    """

    def __init__(self, reader: SectionReader, name: str, rows: torch.Tensor) -> None:
        self._reader, self._name = reader, name
        donor_OI, own_OI = (reader.whole(name, rung).tensor for rung in (Rung.ALIAS, Rung.OWN))
        # A row that the donor lacks is kept as it is, whatever the rung.
        self._has_base = rows < len(donor_OI)
        self._rows = rows[self._has_base]
        self._lent_nI, self._own_nI = donor_OI[self._rows].float(), own_OI[self._rows].float()
        self._factors: dict[Residual, StoredResidual] = {}

    def of(self, rung: AnyRung) -> torch.Tensor:
        """Returns the rung's rows less the variant's, float32 [n, I]."""
        lent_nI = self._lent_nI
        if isinstance(rung, Residual) and rung.rank:
            lent_nI = lent_nI + self._product(rung)
        if isinstance(rung, Residual) and rung.bits:
            codes = Residual(bits=rung.bits, group=rung.group)
            encoder = DeltaEncoder(StoredTensor(tensor=lent_nI), self._own_nI)
            lent_nI = lent_nI + encoder.encode(codes).delta()
        errors_nI = lent_nI.new_zeros(len(self._has_base), lent_nI.shape[1])
        errors_nI[self._has_base] = lent_nI - self._own_nI
        return errors_nI

    def _product(self, rung: Residual) -> torch.Tensor:
        """Returns the rows of a rung's factors multiplied; rungs share the factors."""
        factors = Residual(rank=rung.rank, factor_bits=rung.factor_bits)
        if factors not in self._factors:
            stored = self._reader.passing(self._name, factors)
            assert isinstance(stored, StoredResidual)
            self._factors[factors] = stored
        up, down = self._factors[factors].up, self._factors[factors].down
        assert up is not None
        assert down is not None
        return up.decoded()[:, self._rows].T @ down.decoded()
