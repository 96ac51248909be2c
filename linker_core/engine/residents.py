"""The models that the engine can serve now, and how they come and go.

Loading is a generator: the engine advances it in slices between steps, so that serving goes on.
"""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator
from pathlib import Path

import torch

from linker_core.config import EngineConfig
from linker_core.engine.background import in_background
from linker_core.engine.devices import activation_dtype
from linker_core.engine.family import Family, kv_shape
from linker_core.engine.first_token import generate_first_token, has_room
from linker_core.engine.kv_size import kv_cache_bytes
from linker_core.engine.messages import LoadModel, ModelBytes
from linker_core.engine.resident_model import ResidentModel, fingerprint_of
from linker_core.engine.weight_files import WeightFiles
from linker_core.errors import ConflictError, ModelNotFoundError
from linker_core.residency.pool import Pool, ResidentVariant
from linker_core.sharing.family import check_same_family
from linker_core.weights.architecture import ModelConfig

_MAX_ANSWERED = 4096


class Residents:
    """Models by name, families by the name of their head, whom others name as their donor.

    Args:
        config: The engine's settings.
        device: Where weights and pages lie.
        clock: Monotonic seconds.
    """

    def __init__(
        self, config: EngineConfig, *, device: torch.device, clock: Callable[[], float]
    ) -> None:
        self.pool = Pool(device=device, budget_bytes=config.memory_budget_bytes)
        self.families: dict[str, Family] = {}
        self.served: dict[str, ResidentModel] = {}
        self._replaced: list[ResidentModel] = []
        self._trying: tuple[Family, int] | None = None  # the slot of who has no first token yet
        # What has given a token: the digest of its weights, and its arithmetic.
        self._answered: OrderedDict[tuple[str, ModelConfig], None] = OrderedDict()
        # Counted by families that have gone.
        self.past_preemptions = 0
        self.past_prefix_queries = 0
        self.past_prefix_hits = 0
        self.past_batch_variants: Counter[int] = Counter()
        self._config = config
        self._device = device
        self._clock = clock
        # Slots are never used twice, so nothing can be mistaken for a model that has gone.
        self._slots = itertools.count()
        self._dtype = activation_dtype(device)

    def load(self, message: LoadModel) -> Generator[int | None, None, ResidentModel]:
        """Makes a model resident; all or nothing, also when the generator is closed early.

        One that it replaces serves until the last moment, and then ends what it has begun.

        Yields:
            Bytes moved so far, 0 before the first of them is read; None before the first token of
            weights that have given none, and as long as there is no page for it, which steps of
            others may free.

        Returns:
            The model, ready for requests.

        Raises:
            LinkerError: Bad or changed files, no such donor, nothing to replace, not enough memory,
                or no first token.
        """
        replaced = self._to_replace(message)
        stored_as = message.model if replaced is None else f"{message.model} (arriving)"
        with WeightFiles(message) as files:
            files.check_unchanged()
            family = self._family_for(message)
            try:
                if self.pool.needs_base(message.plan, message.donor):
                    files.open_base()
                    files.check_unchanged()
                resident, slot = yield from self._admit(stored_as, message, files, family)
            except BaseException:
                if message.donor is None:
                    self._drop(family)
                raise
        if replaced is not None:
            self._retire(replaced)
            self.pool.rename(stored_as, message.model)
        return self._serve(message, family, resident.config, slot)

    def leaving(self) -> list[ResidentModel]:
        """Returns the models that leave as soon as they have no sequences, in that order.

        A name is free only when those that had it before have left, too.
        """
        names = {old.name for old in self._replaced}
        unloading = [served for served in self.served.values() if served.unloading]
        return [*self._replaced, *(served for served in unloading if served.name not in names)]

    def rehome(self, head: ResidentModel, heir: str) -> None:
        """Makes another model the head of a family at once; the old one serves on as a member.

        No tensor moves, and no slot, page or answer changes.

        Raises:
            ModelNotFoundError: The heir is not loaded.
            ConflictError: It is not of the family, or another is its head by now.
        """
        family, successor = head.family, self.served.get(heir)
        if not head.is_head and family.name == heir:
            return  # as asked before
        if successor is None or successor.unloading:
            raise ModelNotFoundError(
                f"The heir '{heir}' of model '{head.name}' is not loaded. Load it first.",
                param="model",
            )
        if not head.is_head or successor.family is not family or successor is head:
            raise ConflictError(
                f"'{heir}' is no variant of '{head.name}', so it cannot take its place."
            )
        self.pool.rehome(family.name, heir)
        self.families = {
            heir if known is family else name: known for name, known in self.families.items()
        }
        family.name = heir

    def unload(self, served: ResidentModel) -> None:
        """Gives back what only a model reaches. It has no sequences and is nobody's donor."""
        if served.is_replaced:
            self._replaced.remove(served)
        else:
            del self.served[served.name]
        served.family.runner.unbind(served.slot)
        self.pool.remove(served.stored_as)
        if served.is_head:
            self._drop(served.family)

    def dependants(self, name: str) -> list[str]:
        """Returns the other models of which `name` is the donor."""
        if name not in self.served:
            return []
        leaning = self.pool.ledger.dependants(name)
        models = [*self.served.values(), *self._replaced]
        names = dict.fromkeys(m.name for m in models if m.stored_as in leaning)
        names.pop(name, None)  # what it has replaced leaves before it
        return list(names)

    def bytes_of(self, name: str) -> ModelBytes:
        """Returns what the ledger says of a resident model."""
        ledger = self.pool.ledger
        return ModelBytes(
            logical=ledger.logical_bytes(name),
            unique=ledger.unique_bytes(name),
            shared=ledger.shared_bytes(name),
        )

    def leaving_bytes(self) -> int:
        """Returns what models that were replaced hold until their sequences end."""
        return sum(self.pool.ledger.unique_bytes(old.stored_as) for old in self._replaced)

    def check_integrity(self) -> None:
        """Asserts that pool, families and models agree."""
        self.pool.check_integrity()
        models = [*self.served.values(), *self._replaced]
        assert {m.stored_as for m in models} <= set(self.pool.ledger.models())
        assert all(name == served.name for name, served in self.served.items())
        assert all(old.unloading and old.is_replaced for old in self._replaced)
        for family in self.families.values():
            slots = [m.slot for m in models if m.family is family]
            if self._trying is not None and self._trying[0] is family:
                slots.append(self._trying[1])
            assert sorted(family.runner.model.slots) == sorted(slots)
        assert all(m.family is self.families[m.family.name] for m in models)
        assert all(self.pool.ledger.head_of(m.stored_as) == m.family.name for m in models)

    def _to_replace(self, message: LoadModel) -> ResidentModel | None:
        """Returns the model whose name the new one takes over, if there is to be one.

        Raises:
            ConflictError: The name is taken, or its model is a donor.
            ModelNotFoundError: There is nothing to replace.
        """
        served = self.served.get(message.model)
        if not message.replaces:
            if served is not None:
                raise ConflictError(f"Model '{message.model}' is already loaded. Unload it first.")
            return None
        if served is None:
            raise ModelNotFoundError(
                f"The model '{message.model}' is not loaded, so nothing can be replaced. Load it.",
                param="model",
            )
        if served.is_head or message.donor is None:
            raise ConflictError(
                f"Model '{message.model}' cannot be replaced by or as the donor of a family, which "
                "holds everything itself. Only variants have another plan."
            )
        return served

    def _retire(self, served: ResidentModel) -> None:
        """Leaves a model to the sequences that it has; its name is free."""
        served.stored_as = f"{served.name} (slot {served.slot}, leaving)"
        served.unloading = True
        self.pool.rename(served.name, served.stored_as)
        self._replaced.append(served)

    def _admit(
        self, stored_as: str, message: LoadModel, files: WeightFiles, family: Family
    ) -> Generator[int | None, None, tuple[ResidentVariant, int]]:
        """Brings weights in, binds them to a slot and has it tried; returns both."""
        resident = yield from self.pool.admit(
            stored_as, files.own, message.plan, message.donor, base=files.base
        )
        try:
            # Once more: what was rewritten while it was read is torn.
            files.check_unchanged()
            # Code that is new to this machine; no step waits for its compilation.
            for _ in in_background(family.runner.warming_up(resident.tensors)):
                yield resident.moved_bytes
            slot = next(self._slots)
            family.runner.bind(slot, resident.tensors)
            yield from self._try(message, family, slot)
        except BaseException:
            self.pool.remove(stored_as)
            raise
        return resident, slot

    def _try(self, message: LoadModel, family: Family, slot: int) -> Generator[None, None, None]:
        """Has a slot give its first token; lets go of the slot if it cannot."""
        answered = (fingerprint_of(message), message.config)
        if answered in self._answered:  # it returns, and the same words give the same numbers
            self._answered.move_to_end(answered)
            return
        self._trying = family, slot
        try:
            yield
            while not has_room(family):
                yield
            generate_first_token(family, slot, message.config, name=message.model)
        except BaseException:
            family.runner.unbind(slot)
            raise
        finally:
            self._trying = None
        self._answered[answered] = None
        if len(self._answered) > _MAX_ANSWERED:
            self._answered.popitem(last=False)

    def _family_for(self, message: LoadModel) -> Family:
        model = message.config
        if message.donor is not None:
            donor = self.served.get(message.donor)
            if donor is None or donor.unloading:
                raise ModelNotFoundError(
                    f"The donor '{message.donor}' of model '{message.model}' is not loaded. "
                    "Load it first.",
                    param="donor",
                )
            if donor.family.name != donor.name:
                raise ConflictError(
                    f"'{message.donor}' is itself a variant of '{donor.family.name}'. "
                    "Name that one as the donor."
                )
            check_same_family(donor.family.model, model)
            return donor.family
        if message.base is not None:
            check_same_family(message.base.config, model)
            model = message.base.config  # so that the family is what it was under its donor
        shape = kv_shape(model, self._config, dtype=self._dtype)
        self.pool.budget.reserve_kv(message.model, kv_cache_bytes(model, self._config))
        try:
            family = Family(
                message.model,
                model,
                shape,
                config=self._config,
                device=self._device,
                clock=self._clock,
            )
        except BaseException:
            self.pool.budget.release_kv(message.model)
            raise
        self.families[message.model] = family
        return family

    def _drop(self, family: Family) -> None:
        del self.families[family.name]
        self.past_preemptions += family.scheduler.num_preemptions
        self.past_prefix_queries += family.scheduler.prefix_queries
        self.past_prefix_hits += family.scheduler.prefix_hits
        self.past_batch_variants += family.batch_variants
        self.pool.budget.release_kv(family.name)

    def _serve(
        self, message: LoadModel, family: Family, model: ModelConfig, slot: int
    ) -> ResidentModel:
        limits = [model.max_position_embeddings, family.cache.shape.num_tokens]
        if message.max_model_len is not None:
            limits.append(message.max_model_len)
        served = ResidentModel(
            name=message.model,
            family=family,
            slot=slot,
            vocab_size=model.vocab_size,
            max_model_len=min(limits),
            directory=Path(message.path),
            plan_fingerprint=fingerprint_of(message),
            stored_as=message.model,
        )
        self.served[message.model] = served
        return served
