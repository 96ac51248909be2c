"""The device's memory: which models are resident, what they hold, and whether another one fits.

Used by one thread, the engine's. Admission is all or nothing: whatever fails, the pool is as it
was before.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace

import torch

from linker_core.errors import ConflictError, ModelNotFoundError
from linker_core.residency.base_store import BaseStore
from linker_core.residency.budget import Budget
from linker_core.residency.device import available_bytes
from linker_core.residency.ledger import Ledger
from linker_core.residency.loader import load_base, load_tensors
from linker_core.residency.reading import Source
from linker_core.residency.stored import Stored, distinct
from linker_core.sharing.plan import SharePlan
from linker_core.weights.architecture import ModelConfig
from linker_core.weights.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidentVariant:
    """A model that is on the device."""

    model: str
    config: ModelConfig
    plan: SharePlan
    tensors: Mapping[str, Stored]  # every name, the tied head's too
    moved_bytes: int  # by its admission: its own, and what was read of the base


class Pool:
    """Resident models under one byte budget for weights and KV pages together.

    A family has a head, which others name as their donor, and the tensors of one base checkpoint
    that any of its models reaches. Who is the head says nothing of whose tensors those are.

    Args:
        device: Where everything lies.
        budget_bytes: None takes what the device has to give now.
    """

    def __init__(self, *, device: torch.device, budget_bytes: int | None = None) -> None:
        self.device = device
        self.ledger = Ledger()
        nbytes = available_bytes(device) if budget_bytes is None else budget_bytes
        self.budget = Budget(nbytes, self.ledger)
        self._variants: dict[str, ResidentVariant] = {}
        self._bases: dict[str, BaseStore] = {}  # by the head of the family

    def admit(
        self,
        model: str,
        source: Source,
        plan: SharePlan,
        donor: str | None,
        *,
        base: Checkpoint | None = None,
    ) -> Generator[int, None, ResidentVariant]:
        """Makes a model resident, a chunk between two yields; closing the generator rolls back.

        Args:
            model: Its name.
            source: Its files; not closed here.
            plan: Made for these files and the base of this donor.
            donor: The head of a resident family, or None for a family's first model.
            base: The checkpoint that the plan was made against: what the plan leans on is read
                from there where it is not resident. Not closed here.

        Yields:
            Bytes moved so far, 0 before the first of them is read.

        Raises:
            ConflictError: The name is resident already, or the plan was made for another donor.
            ModelNotFoundError: The donor is not resident.
            InsufficientCapacityError: What has to be moved does not fit.
            BadCheckpointError: See `load_tensors`.
        """
        if model in self._variants or self.budget.is_expected(model):
            raise ConflictError(f"{model} is resident already.", param="model")
        store = self._store_for(plan, donor, source=source, base=base)
        lacking = [] if base is None else store.lacking(plan, base)
        base_bytes = sum(tensor.nbytes for tensor in lacking)
        moved_bytes = base_bytes + plan.unique_bytes
        self._expect(model, moved_bytes, store.lent(plan), donor)
        try:
            if base is not None:
                store.add((yield from load_base(base, lacking, device=self.device)))
                self._hold(model, store.lent(plan), donor, remaining_bytes=plan.unique_bytes)
            tensors = yield from load_tensors(
                source, plan, store.lent(plan), device=self.device, done_bytes=base_bytes
            )
            variant = ResidentVariant(
                model=model,
                config=source.config,
                plan=plan,
                tensors=tensors,
                moved_bytes=moved_bytes,
            )
            self._enter(variant, donor, store)
        finally:
            self._conclude(model, donor, store)
        return variant

    def needs_base(self, plan: SharePlan, donor: str | None) -> bool:
        """Whether `admit` has to read from the checkpoint that a plan was made against.

        Raises:
            ConflictError: The plan was made for another donor.
            ModelNotFoundError: The donor is not resident.
        """
        if donor is None:
            return plan.donor_fingerprint is not None
        return self._base_of(plan, donor).lacks(plan)

    def remove(self, model: str) -> int:
        """Forgets a model; returns the bytes that are free once nobody else holds its tensors.

        Raises:
            ModelNotFoundError: Not resident.
            ConflictError: It is the donor of others.
        """
        self.get(model)
        head = self.ledger.head_of(model)
        freed = self.ledger.remove(model)
        del self._variants[model]
        if model == head:
            del self._bases[head]
        else:
            self._bases[head].keep(self.ledger.held())
        return freed

    def rehome(self, head: str, heir: str) -> None:
        """Makes another model of a family its head; nothing moves and nothing is freed."""
        self.ledger.rehome(head, heir)
        self._bases[heir] = self._bases.pop(head)
        self.budget.rehome(head, heir)

    def rename(self, model: str, name: str) -> None:
        """Calls a resident model by a name that is free; it is no head."""
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

    def check_integrity(self) -> None:
        """Asserts that ledger, families, plans and budget agree."""
        self.ledger.check_integrity()
        assert self.ledger.models() == list(self._variants)
        assert self.budget.free_bytes() >= 0
        assert set(self._bases) == {self.ledger.head_of(model) for model in self._variants}
        for variant in self._variants.values():
            self._check_variant(variant)
        for base in self._bases.values():
            assert all(entry in self.ledger.held() for entry in base.entries), "kept for nobody"

    def _check_variant(self, variant: ResidentVariant) -> None:
        model, plan, named = variant.model, variant.plan, distinct(variant.tensors)
        base = self._bases[self.ledger.head_of(model)].entries
        own = named - base
        planned_bytes = 0 if plan.donor_fingerprint is None else plan.unique_bytes
        assert sum(entry.nbytes for entry in own) == planned_bytes, model
        assert all(entry.base in base or entry.base in own for entry in named), model
        assert self.ledger.logical_bytes(model) == plan.logical_bytes, model

    def _store_for(
        self, plan: SharePlan, donor: str | None, *, source: Source, base: Checkpoint | None
    ) -> BaseStore:
        """Returns the base's tensors of a resident family, or of a new one, of which none is."""
        if donor is not None:
            return self._base_of(plan, donor)
        if plan.donor_fingerprint is None:
            return BaseStore(plan.variant_fingerprint, source.config)
        assert base is not None, "a variant founds a family over a base alone"
        return BaseStore(plan.donor_fingerprint, base.config)

    def _base_of(self, plan: SharePlan, donor: str) -> BaseStore:
        self.get(donor)
        store = self._bases.get(donor)
        if store is None or store.fingerprint != plan.donor_fingerprint:
            raise ConflictError(f"The plan was made for another donor than {donor}. Scan again.")
        return store

    def _expect(
        self, model: str, nbytes: int, lent: Mapping[str, Stored], donor: str | None
    ) -> None:
        """Reserves what is to be moved, and holds what is leaned on."""
        self.budget.expect(model, nbytes)
        if donor is not None:
            self.ledger.expect(model, lent.values(), head=donor)

    def _hold(
        self, model: str, lent: Mapping[str, Stored], donor: str | None, *, remaining_bytes: int
    ) -> None:
        """Enters what was read of the base in the ledger, if others can reach it already."""
        if donor is not None:
            head = self.ledger.head_of(model)
            self.ledger.give_up(model)
            self.ledger.expect(model, lent.values(), head=head)
            self.budget.lower(model, remaining_bytes)

    def _enter(self, variant: ResidentVariant, donor: str | None, store: BaseStore) -> None:
        """Makes what was moved a resident model's; the family may have another head by now."""
        model = variant.model
        head = None if donor is None else self.ledger.head_of(model)
        self.ledger.add(model, distinct(variant.tensors), head=head)
        self._variants[model] = variant
        if head is None:
            self._bases[model] = store
            if variant.plan.donor_fingerprint is None:
                store.add({name: variant.tensors[name].base for name in variant.plan.rungs})

    def _conclude(self, model: str, donor: str | None, store: BaseStore) -> None:
        """Ends an admission, whatever became of it."""
        self.budget.conclude(model)
        if donor is not None:
            self.ledger.give_up(model)
        store.keep(self.ledger.held())
