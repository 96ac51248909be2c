"""Which stored tensors each resident model reaches. Every byte figure is derived from that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from linker_core.errors import ConflictError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredTensor:
    """One physical weight on the device. Its identity is the object's own: two are never equal."""

    tensor: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes


class Ledger:
    """Models by name, each with the stored tensors it reaches and the donor it may alias.

    Used by one thread, the engine's.
    """

    def __init__(self) -> None:
        self._reached: dict[str, frozenset[StoredTensor]] = {}
        self._donors: dict[str, str | None] = {}

    def add(self, model: str, stored: Iterable[StoredTensor], *, donor: str | None) -> None:
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

    def models(self) -> list[str]:
        """Returns the names in the order they were entered."""
        return list(self._reached)

    def dependants(self, model: str) -> list[str]:
        """Returns the models that have this one as donor."""
        return [name for name, donor in self._donors.items() if donor == model]

    def logical_bytes(self, model: str) -> int:
        """Bytes a separate copy of the model would hold; tied tensors count once."""
        return _nbytes(self._reached[model])

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
        """Asserts Σ unique = resident, and that nobody aliases what its donor does not hold."""
        assert sum(map(self.unique_bytes, self._reached)) == self.resident_bytes()
        storages: dict[int, StoredTensor] = {}
        for stored in frozenset().union(*self._reached.values()):
            pointer = stored.tensor.untyped_storage().data_ptr()
            assert storages.setdefault(pointer, stored) is stored, "two entries for one storage"
        for model, donor in self._donors.items():
            assert donor is None or (donor in self._reached and self._donors[donor] is None), model


def distinct(tensors: Mapping[str, StoredTensor]) -> frozenset[StoredTensor]:
    """Returns the stored tensors behind a name map, each once."""
    return frozenset(tensors.values())


def _nbytes(stored: frozenset[StoredTensor]) -> int:
    return sum(entry.nbytes for entry in stored)
