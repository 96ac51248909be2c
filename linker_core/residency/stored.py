"""What lies on the device for a model's names: whole tensors, rows of their own, residuals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from linker_core.residency.coding import CodedMatrix


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredTensor:
    """One physical weight on the device. Its identity is the object's own: two are never equal."""

    tensor: torch.Tensor

    @property
    def base(self) -> StoredTensor:
        """What products group by: itself."""
        return self

    @property
    def num_rows(self) -> int:
        return self.tensor.shape[0]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What lies on the device for this entry alone."""
        return (self.tensor,)

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    @property
    def logical_bytes(self) -> int:
        """What a separate copy would hold."""
        return self.tensor.nbytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredRows:
    """An embedding or head of which only the rows that are not the donor's are held.

    Row i of the whole is `own[j]` where `positions[j]` is i, and row i of the donor's elsewhere.
    The donor's may have more rows or fewer.
    """

    base: StoredTensor  # the donor's
    own: torch.Tensor  # [n, H]
    positions: torch.Tensor  # [n], int64, ascending
    num_rows: int  # of the whole

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What lies on the device for this entry alone."""
        return (self.own, self.positions)

    @property
    def nbytes(self) -> int:
        return self.own.nbytes + self.positions.nbytes

    @property
    def logical_bytes(self) -> int:
        """What a separate copy would hold."""
        return self.num_rows * self.own.shape[1] * self.own.element_size()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredResidual:
    """A matrix of which only the delta to the donor's is held, compressed.

    W = the donor's + dense + upᵀ down, for the rows that both have; the rows that the donor lacks
    follow as they are.
    """

    base: StoredTensor  # the donor's [rows of its own, I]
    dense: CodedMatrix | None  # [O, I]
    down: CodedMatrix | None  # [r, I]; with `up` or not at all
    up: CodedMatrix | None  # [r, O]
    extra: torch.Tensor  # [n, I], rows that the donor lacks, in the variant's type; mostly none

    @property
    def num_coded(self) -> int:
        """Rows that the donor has, too."""
        return self.dense.num_rows if self.dense is not None else self._up.width

    @property
    def num_rows(self) -> int:
        """Rows of the whole."""
        return self.num_coded + self.extra.shape[0]

    @property
    def parts(self) -> tuple[CodedMatrix, ...]:
        """The coded matrices that there are."""
        return tuple(part for part in (self.dense, self.down, self.up) if part is not None)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What lies on the device for this entry alone."""
        return (*(tensor for part in self.parts for tensor in part.tensors), self.extra)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def logical_bytes(self) -> int:
        """What a separate copy would hold."""
        return self.num_rows * self.extra.shape[1] * self.extra.element_size()

    def delta(self, rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """Returns rows of dense + upᵀ down, float32 [n, I]; what `extra` holds has none.

        Each row is summed in the same order whatever the other rows.
        """
        width = self.extra.shape[1]
        parts: list[torch.Tensor] = []
        if self.dense is not None:
            parts.append(self.dense.decoded(rows))
        if self.down is not None:
            up_rn, down_rI = self._up.columns(rows), self.down.decoded()
            product_nI = up_rn.new_zeros(up_rn.shape[1], width)
            for up_n, down_I in zip(up_rn, down_rI, strict=True):
                product_nI += up_n.unsqueeze(1) * down_I
            parts.append(product_nI)
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    @property
    def _up(self) -> CodedMatrix:
        assert self.up is not None
        return self.up


Stored = StoredTensor | StoredRows | StoredResidual


def distinct(tensors: Mapping[str, Stored]) -> frozenset[Stored]:
    """Returns what is stored behind a name map, each once."""
    return frozenset(tensors.values())
