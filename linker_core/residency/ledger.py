"""Which stored tensors each resident model reaches. Every byte figure is derived from that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from linker_core.errors import ConflictError
from linker_core.residency.coding import CodedMatrix

_Value = TypeVar("_Value")


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


class Ledger:
    """Models by name, each with the stored tensors it reaches and the donor it may alias.

    Used by one thread, the engine's.
    """

    def __init__(self) -> None:
        self._reached: dict[str, frozenset[Stored]] = {}
        self._donors: dict[str, str | None] = {}

    def add(self, model: str, stored: Iterable[Stored], *, donor: str | None) -> None:
        """Enters a model whose tensors are on the device."""
        assert model not in self._reached
        assert donor is None or donor in self._reached
        self._reached[model] = frozenset(stored)
        self._donors[model] = donor

    def remove(self, model: str) -> int:
        """Strikes a model; returns the bytes that only it held.

        Raises:
            ConflictError: Others alias its tensors; lists them.
        """
        if dependants := self.dependants(model):
            raise ConflictError(
                f"{model} is the donor of {', '.join(dependants)}. Remove these first.",
                param="model",
            )
        freed = self.unique_bytes(model)
        del self._reached[model], self._donors[model]
        return freed

    def rename(self, model: str, name: str) -> None:
        """Enters a model under another name; nobody has it as donor."""
        assert name not in self._reached
        assert not self.dependants(model)
        self._reached = _renamed(self._reached, model, name)
        self._donors = _renamed(self._donors, model, name)

    def models(self) -> list[str]:
        """Returns the names in the order they were entered."""
        return list(self._reached)

    def dependants(self, model: str) -> list[str]:
        """Returns the models that have this one as donor."""
        return [name for name, donor in self._donors.items() if donor == model]

    def logical_bytes(self, model: str) -> int:
        """Bytes a separate copy of the model would hold; tied tensors count once."""
        return sum(entry.logical_bytes for entry in self._reached[model])

    def unique_bytes(self, model: str) -> int:
        """Bytes only this model holds; all of them for a donor."""
        donor = self._donors[model]
        return _nbytes(self._reached[model] - (self._reached[donor] if donor else frozenset()))

    def shared_bytes(self, model: str) -> int:
        """Bytes the model reads from its donor."""
        return self.logical_bytes(model) - self.unique_bytes(model)

    def resident_bytes(self) -> int:
        """Bytes of the union of all stored tensors."""
        return _nbytes(frozenset().union(*self._reached.values()))

    def check_integrity(self) -> None:
        """Asserts Σ unique = resident, and that nobody leans on what its donor does not hold."""
        assert sum(map(self.unique_bytes, self._reached)) == self.resident_bytes()
        self._check_storages()
        for model, donor in self._donors.items():
            assert donor is None or (donor in self._reached and self._donors[donor] is None), model
            lent = self._reached[donor] if donor else frozenset()
            for entry in self._reached[model]:
                assert isinstance(entry, StoredTensor) or entry.base in lent, model

    def _check_storages(self) -> None:
        storages: dict[int, torch.Tensor] = {}
        for entry in frozenset().union(*self._reached.values()):
            for tensor in entry.tensors:
                storage = tensor.untyped_storage()
                assert storage.nbytes() == tensor.nbytes, "part of a larger storage"
                if tensor.nbytes:  # empty storages all have the same address
                    held = storages.setdefault(storage.data_ptr(), tensor)
                    assert held is tensor, "two entries for one storage"


def distinct(tensors: Mapping[str, Stored]) -> frozenset[Stored]:
    """Returns what is stored behind a name map, each once."""
    return frozenset(tensors.values())


def _renamed(entries: Mapping[str, _Value], old: str, new: str) -> dict[str, _Value]:
    return {new if key == old else key: value for key, value in entries.items()}


def _nbytes(stored: frozenset[Stored]) -> int:
    return sum(entry.nbytes for entry in stored)
