"""The device's memory: which models are resident, what they hold, and whether another one fits.

Used by one thread, the engine's. Admission is all or nothing: whatever fails, the pool is as it
was before.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace

import torch

from linker_core.errors import ConflictError, InsufficientCapacityError, ModelNotFoundError
from linker_core.residency.device import available_bytes
from linker_core.residency.ledger import Ledger, Stored, distinct
from linker_core.residency.loader import load_tensors
from linker_core.residency.reading import Source
from linker_core.sharing.plan import SharePlan
from linker_core.weights.architecture import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidentVariant:
    """A model that is on the device."""

    model: str
    config: ModelConfig
    plan: SharePlan
    donor: str | None
    tensors: Mapping[str, Stored]  # every name, the tied head's too


class Pool:
    """Resident models under one byte budget for weights and KV pages together.

    Args:
        device: Where everything lies.
        budget_bytes: None takes what the device has to give now. KV pages count in full from
            their reservation on, though a CPU backs them with memory only once they are written.
    """

    def __init__(self, *, device: torch.device, budget_bytes: int | None = None) -> None:
        self.device = device
        self.ledger = Ledger()
        self._budget_bytes = available_bytes(device) if budget_bytes is None else budget_bytes
        self._variants: dict[str, ResidentVariant] = {}
        self._kv_bytes: dict[str, int] = {}  # family -> bytes of its KV cache
        self._arriving: dict[str, int] = {}  # model -> bytes reserved for its admission
        self._reserved: dict[str, int] = {}  # name -> bytes that another process uses

    def admit(
        self, model: str, source: Source, plan: SharePlan, donor: str | None
    ) -> Generator[int, None, ResidentVariant]:
        """Makes a model resident, a chunk between two yields; closing the generator rolls back.

        Args:
            model: Its name.
            source: Its files; not closed here.
            plan: Made for these files and this donor.
            donor: Name of a resident donor, or None for a family's first model.

        Yields:
            Bytes moved so far, 0 before the first of them is read.

        Raises:
            ConflictError: The name is resident already, or the plan was made for another donor.
            ModelNotFoundError: The donor is not resident.
            InsufficientCapacityError: The unique bytes do not fit.
            BadCheckpointError: See `load_tensors`.
        """
        if model in self._variants or model in self._arriving:
            raise ConflictError(f"{model} is resident already.", param="model")
        lender = self._lender(plan, donor)
        self._require(plan.unique_bytes, what=f"the unique weights of {model}")
        self._arriving[model] = plan.unique_bytes
        try:
            tensors = yield from load_tensors(
                source, plan, lender.tensors if lender else {}, device=self.device
            )
            if donor is not None and donor not in self._variants:
                raise ModelNotFoundError(f"The donor {donor} left while {model} was loading.")
        finally:
            del self._arriving[model]
        variant = ResidentVariant(
            model=model, config=source.config, plan=plan, donor=donor, tensors=tensors
        )
        self.ledger.add(model, distinct(tensors), donor=donor)
        self._variants[model] = variant
        return variant

    def remove(self, model: str) -> int:
        """Forgets a model; returns the bytes that are free once nobody else holds its tensors.

        Raises:
            ModelNotFoundError: Not resident.
            ConflictError: It is the donor of others.
        """
        self.get(model)
        freed = self.ledger.remove(model)
        del self._variants[model]
        return freed

    def rename(self, model: str, name: str) -> None:
        """Calls a resident model by a name that is free; it is nobody's donor."""
        assert name not in self._variants
        self.ledger.rename(model, name)
        self._variants = {
            variant.model: variant
            for variant in (
                replace(known, model=name) if known.model == model else known
                for known in self._variants.values()
            )
        }

    def get(self, model: str) -> ResidentVariant:
        """Returns a resident model.

        Raises:
            ModelNotFoundError: Not resident.
        """
        if model not in self._variants:
            raise ModelNotFoundError(f"The model {model!r:.120} is not resident.", param="model")
        return self._variants[model]

    def models(self) -> list[ResidentVariant]:
        """Returns the resident models in the order of their admission."""
        return list(self._variants.values())

    def reserve_kv(self, family: str, nbytes: int) -> None:
        """Sets bytes aside for a family's KV cache.

        Raises:
            InsufficientCapacityError: They do not fit.
        """
        assert family not in self._kv_bytes
        self._require(nbytes, what=f"the KV cache of {family}")
        self._kv_bytes[family] = nbytes

    def release_kv(self, family: str) -> None:
        """Gives a family's KV bytes back."""
        del self._kv_bytes[family]

    def kv_bytes(self) -> int:
        """Bytes reserved for KV caches."""
        return sum(self._kv_bytes.values())

    def reserve(self, name: str, nbytes: int) -> None:
        """Sets bytes aside for another process on the same device.

        Raises:
            ConflictError: The name has a reservation already.
            InsufficientCapacityError: They do not fit.
        """
        assert nbytes >= 0
        if name in self._reserved:
            raise ConflictError(f"Memory is reserved for {name} already. Release it first.")
        self._require(nbytes, what=name)
        self._reserved[name] = nbytes

    def release(self, name: str) -> None:
        """Gives a reservation back; harmless when there is none."""
        self._reserved.pop(name, None)

    def reserved_bytes(self) -> int:
        """Bytes set aside for other processes."""
        return sum(self._reserved.values())

    def free_bytes(self) -> int:
        """Bytes left of the budget."""
        promised = sum(self._arriving.values()) + self.reserved_bytes()
        return self._budget_bytes - self.ledger.resident_bytes() - promised - self.kv_bytes()

    def check_integrity(self) -> None:
        """Asserts that ledger, variants and budget agree."""
        self.ledger.check_integrity()
        assert self.ledger.models() == list(self._variants)
        assert self.free_bytes() >= 0
        for variant in self._variants.values():
            assert self.ledger.unique_bytes(variant.model) == variant.plan.unique_bytes
            assert self.ledger.logical_bytes(variant.model) == variant.plan.logical_bytes

    def _lender(self, plan: SharePlan, donor: str | None) -> ResidentVariant | None:
        if donor is None:
            return None
        lender = self.get(donor)
        if plan.donor_fingerprint != lender.plan.variant_fingerprint:
            raise ConflictError(f"The plan was made for another donor than {donor}. Scan again.")
        return lender

    def _require(self, nbytes: int, *, what: str) -> None:
        free = self.free_bytes()
        if nbytes > free:
            raise InsufficientCapacityError(
                f"{nbytes} bytes are needed for {what}, {max(free, 0)} are free. Remove a model, "
                "raise the memory budget, or lower kv_cache_tokens."
            )
